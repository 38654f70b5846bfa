"""The attack suite: liars of many kinds against the real coordinator, and honest nodes that are odd.

``stage.py`` is one network in this process, ``kinds.py`` what its nodes may do, ``suite.py`` the
arms and their table, ``loris.py`` what needs sockets.
"""
