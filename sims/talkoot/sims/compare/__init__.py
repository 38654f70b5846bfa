"""Runs and plans beside each other, with a band over their seeds."""
