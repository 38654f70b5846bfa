"""A whole network in one process, without sockets, on the code that the real one runs.

``world.py``      what an arm stands on: model, corpus, held-out text, from an operator's Config
``behaviour.py``  what a node is like (speed, absence, shard) and what it may do instead
``network.py``    rounds: plan, train, encode, verify, aggregate, publish, apply
``baseline.py``   the two measures: one node alone, and all nodes as one data-parallel job
"""
