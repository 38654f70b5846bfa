"""The codec's two kinds of inner loops, for tests: NumPy's and the compiled ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from talkoot.protocol.kernels import KERNELS

KINDS = ("numpy", "compiled")


@contextmanager
def running(kind: str) -> Iterator[None]:
    """With loops of one kind; Numba, of the extra ``compiled``, belongs to ``dev``."""
    with KERNELS.running(compiled=kind == "compiled") as module:
        assert (module is not None) == (kind == "compiled")
        yield


@pytest.fixture(params=KINDS, scope="module", autouse=True)
def both_loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs all tests of a module that imports it twice."""
    with running(request.param):
        yield
