"""The attack suite: liars of many kinds against the real coordinator, and odd honest nodes.

``stage.py`` is one network in this process, ``kinds.py`` what its nodes may do, ``loris.py`` a
stage with a line on which liars hold uploads open, ``suite.py`` the arms, ``figures.py`` the table.
"""
