"""``talkoot-sim parity``: how much of what a data centre would learn the network learns.

``options.py``  what is compared: a base configuration, arms that change it, seeds
``run.py``      runs what is missing, in the lab, and keeps each curve
``result.py``   captured share, table and ``parity.json`` from the curves (pure)
``report.py``   figure and page
"""
