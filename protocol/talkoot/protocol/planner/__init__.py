"""What a replica needs, by running its real training step on tensors that hold nothing.

``simulate`` runs the code of ``replica.py`` under ``tracker``, which writes down every allocation;
``allocator`` replays them as CUDA's caching allocator would; ``plans`` keeps the answers (a table
is shipped, the rest is cached); ``choose`` picks a recipe for a machine. Only ``simulate``,
``tracker`` and ``__main__`` import torch. ADR 9.
"""
