"""A lease's blocks as batches of sequences, in an order that the lease's id decides.

A node trains on them and a validator repeats it: both must cut the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from talkoot.protocol.corpus import CorpusManifest, load_block
from talkoot.protocol.errors import ProtocolError
from talkoot.protocol.leases import block_order
from talkoot.protocol.messages import Lease, RunSpec
from talkoot.protocol.steps import LeaseSteps, steps_of


class Sequences:
    """The sequences of one lease.

    A block of ``block_tokens`` tokens is cut into ``block_tokens / sequence_length`` sequences
    (sequences never cross blocks). All sequences of the lease are shuffled together by the lease's
    id and taken ``micro_batch`` at a time; the last batch may be smaller, so that every token is
    used exactly once. Which batches make a step, ``steps`` knows.

    Raises:
        ProtocolError: a block is not whole sequences, or the lease is not these blocks.
        IntegrityError: a block is not what the corpus says.
    """

    def __init__(
        self, spec: RunSpec, corpus: CorpusManifest, lease: Lease, blocks: Sequence[Path | bytes]
    ) -> None:
        length = spec.sequence_length
        if corpus.block_tokens % length:
            raise ProtocolError(
                f"A block of {corpus.block_tokens} tokens cannot be cut into sequences of "
                f"{length}: the operator must build the corpus with a multiple of that.",
                code="corpus-mismatch",
            )
        if (len(blocks), len(blocks) * corpus.block_tokens) != (len(lease.blocks), lease.tokens):
            raise ProtocolError(
                f"The lease promises {len(lease.blocks)} blocks and {lease.tokens} tokens, but "
                f"{len(blocks)} blocks of {corpus.block_tokens} tokens are given.",
                code="lease-mismatch",
            )
        # The ids stay as small as they travelled until a batch is made of them.
        self._rows = [load_block(path, corpus).reshape(-1, length) for path in blocks]
        self._per_block = corpus.block_tokens // length
        self._micro_batch = spec.micro_batch
        self._length = length
        self.steps: Final[LeaseSteps] = steps_of(spec, lease.tokens)
        self._order = block_order(int(lease.lease_id[:16], 16), 0, self.count)

    @property
    def count(self) -> int:
        """Sequences in the lease."""
        return len(self._rows) * self._per_block

    @property
    def tokens(self) -> int:
        """Tokens in the lease."""
        return self.count * self._length

    def tokens_after(self, batches: int) -> int:
        """Tokens in the first ``batches`` batches."""
        return min(batches * self._micro_batch, self.count) * self._length

    def batch(self, number: int) -> Tensor:
        """(sequences, sequence_length) int64 on the CPU: batch ``number``, counted from 0."""
        start = number * self._micro_batch
        chosen = self._order[start : start + self._micro_batch].tolist()
        batch = torch.empty((len(chosen), self._length), dtype=torch.int64)
        for row, position in enumerate(chosen):
            block, inside = divmod(position, self._per_block)
            batch[row] = torch.from_numpy(self._rows[block][inside].astype("int64"))
        return batch
