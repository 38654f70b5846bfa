"""``make chaos``: a real network whose every process is killed, hundreds of times, and audited.

``plan.py`` decides by a seed who dies when (pure); ``arena.py`` is the network that it happens to,
with whatever restarts the dead; ``soak.py`` strikes, audits and measures; ``replay.py`` computes
the whole run again from what was accepted; ``paired.py`` runs one network twice, with and without
deaths.
"""
