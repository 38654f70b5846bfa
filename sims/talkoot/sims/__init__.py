"""The researcher: local networks of real processes, and their reports."""
