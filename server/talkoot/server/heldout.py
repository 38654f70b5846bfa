"""Held-out loss: which rows of the held-out text are looked at, and the mean loss on them.

A torch module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from talkoot.protocol.corpus import Tokens
from talkoot.protocol.errors import CorpusError

ROWS_AT_ONCE = 32
"""Sequences in a forward pass: the logits are what needs memory."""


def heldout_rows(tokens: Tokens, sequence_length: int, most_tokens: int) -> Tensor:
    """(sequences, sequence_length) int64: at most ``most_tokens`` tokens, spread evenly.

    The same arguments give the same rows, so losses of different versions can be compared.

    Raises:
        CorpusError: the held-out text is shorter than one sequence.
    """
    whole = len(tokens) // sequence_length
    if whole == 0:
        raise CorpusError(
            f"The held-out text has {len(tokens)} tokens, less than one sequence of "
            f"{sequence_length}: raise corpus.heldout_fraction."
        )
    wanted = max(1, min(whole, most_tokens // sequence_length))
    rows = torch.empty((wanted, sequence_length), dtype=torch.int64)
    for i in range(wanted):
        start = i * whole // wanted * sequence_length
        rows[i] = torch.from_numpy(tokens[start : start + sequence_length].astype("int64"))
    return rows


@torch.inference_mode()
def heldout_loss(model: torch.nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy of a causal LM on ``rows``, nats per token; its mode is kept."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE].to(device)
        answer: Any = model(input_ids=batch, labels=batch, use_cache=False)
        total += float(answer.loss) * len(batch)
    model.train(training)
    return total / len(rows)
