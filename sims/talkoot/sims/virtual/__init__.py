"""``talkoot-sim run``: a network with real training, in Flower's simulation engine on Ray.

The coordinator's ``ServerApp`` and the nodes' ``ClientApp`` are production's objects, and so is all
that they stand on: ledger, rounds, admission, leases, belief, aggregation, worker, trainer, codec.
Two things are not: the clock, and the transport (ADR 19).

``population.py``  who the nodes are: speeds, lines, hours, keys, all from the seed
``layout.py``      the directory of a run, and what both sides leave for each other in it
``site.py``        the operator's state directory, and nodes' admission
``timing.py``      when a lease is fetched, trained and pushed on a node's device and line
``world.py``       the virtual clock and what happens next
``conductor.py``   the round loop on that clock
``control.py``     its way to the nodes
``work.py``        real work by way of Flower's grid
``host.py``        in Ray's actors: lends the ClientApp a worker, as a volunteer's daemon does
``plane.py``       the worker's data plane over files
``trainer.py``     the worker's trainer, in its own process, on a simulated device
``engine.py``      the process that runs Flower's engine
``session.py``     its processes, and their end
``command.py``     starts it, shows progress, cleans up; the Python function ``run``
``result.py``      figures, tables and ``report.py`` the page
"""
