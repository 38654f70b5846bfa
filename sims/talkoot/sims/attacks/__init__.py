"""The attack suite: liars of many kinds against the real coordinator, and odd honest nodes.

``stage.py`` is one network in this process, ``kinds.py`` what its nodes may do, ``suite.py`` the
arms and their table.
"""
