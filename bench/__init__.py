"""Measurements that back the figures in the docs: ``python -m bench``, ``make bench``."""
