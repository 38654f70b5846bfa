"""The trainer: a child process with torch that holds the node's replica and trains it.

``__main__`` is the process, ``core.Trainer`` what it does (usable in-process), ``workdir`` what
survives a crash. This file imports no torch.
"""
