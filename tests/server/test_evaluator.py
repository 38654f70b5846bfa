"""Held-out loss of published versions: measured beside the rounds, by source, and shown."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select

from talkoot.protocol.corpus import HELDOUT_SOURCES
from talkoot.protocol.errors import CorpusError, StateError
from talkoot.protocol.tokenizer import load_tokenizer
from talkoot.server.config import override_config
from talkoot.server.corpus import build_corpus
from talkoot.server.evaluator import Evaluator, due
from talkoot.server.export import export_version
from talkoot.server.heldout import heldout_loss, mean_loss, rows_by_source
from talkoot.server.ledger.schema import Evaluation, Event, Version
from talkoot.server.status import status
from talkoot.server.tables import print_status

from .conftest import Site


def set_every(site: Site, every: int) -> None:
    changed = override_config(site.coordinator.config, {"evaluation.every": every})
    object.__setattr__(site.coordinator, "config", changed)


def publish(site: Site, number: int) -> None:
    """Another version in the ledger, with the files of version 0."""
    versions = site.coordinator.state.versions
    directory = f"v{number:08d}"
    shutil.copytree(versions / "v00000000", versions / directory)
    with site.coordinator.ledger.write() as session:
        first = session.scalars(select(Version).where(Version.version == 0)).one()
        session.add(
            Version(
                run_id=first.run_id,
                version=number,
                weights_digest=first.weights_digest,
                update_digest=None,
                update_bytes=None,
                checkpoint_digest=None,
                checkpoint_bytes=None,
                directory=directory,
                published_unix=1.0,
            )
        )


def test_a_published_version_is_measured_once_and_shown_everywhere(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluator = Evaluator(site.coordinator)
    assert status(site.coordinator)["heldout"] is None
    assert evaluator.step()
    assert not evaluator.step()
    document = status(site.coordinator)
    found = document["heldout"]
    assert found["version"] == 0
    assert found["loss"] == pytest.approx(math.log(260), abs=0.3)  # fresh weights know nothing
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert [row["source"] for row in found["sources"]] == list(site.coordinator.corpus.sources)
    print_status(document)
    assert f"{found['loss']:.4f}" in capsys.readouterr().out
    assert list(site.coordinator.state.run.glob("evaluated*")) == []

    export_version(site.coordinator, tmp_path / "model", None)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{found['loss']:.4f}" in card
    assert json.loads((tmp_path / "model" / "talkoot.json").read_text())["evaluation"] == found


def test_an_export_of_a_version_that_was_not_measured_says_so(site: Site, tmp_path: Path) -> None:
    export_version(site.coordinator, tmp_path / "model", 0)
    assert "This version was not measured." in (tmp_path / "model" / "README.md").read_text()


def test_only_the_newest_version_is_measured_and_only_every_so_often(site: Site) -> None:
    set_every(site, 2)
    publish(site, 1)
    assert due(site.coordinator) is None
    publish(site, 2)
    wanted = due(site.coordinator)
    assert wanted is not None
    assert wanted.version == 2
    set_every(site, 0)
    assert due(site.coordinator) is None
    set_every(site, 2)
    publish(site, 3)  # the run's last, whatever its number
    wanted = due(site.coordinator)
    assert wanted is not None
    assert wanted.version == 3


def test_a_version_whose_files_are_gone_is_passed_over(site: Site) -> None:
    shutil.rmtree(site.coordinator.state.versions / "v00000000")
    assert not Evaluator(site.coordinator).step()


def test_a_coordinator_without_the_memory_says_so_once_and_goes_on(site: Site) -> None:
    evaluator = Evaluator(site.coordinator, available_bytes=lambda: 1000)
    with pytest.raises(StateError, match=r"evaluation\.every"):
        evaluator.step()
    turns = iter([False, False, True])
    evaluator.run(SimpleNamespace(wait=lambda _: next(turns)))  # type: ignore[arg-type]
    with site.coordinator.ledger.read() as session:
        assert len(session.scalars(select(Event).where(Event.kind == "evaluation")).all()) == 1
        assert session.scalars(select(Evaluation)).all() == []


def test_too_little_memory_for_fp32_is_enough_for_bf16(site: Site) -> None:
    parameters = site.coordinator.spec.parameters
    evaluator = Evaluator(site.coordinator, available_bytes=lambda: 4 * parameters)
    assert evaluator.step()
    found = status(site.coordinator)["heldout"]
    assert found["loss"] == pytest.approx(math.log(260), abs=0.3)


@pytest.fixture
def two_sources(tmp_path: Path) -> tuple[Path, Any]:
    for name, count in (("a", 40), ("b", 10)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.txt").write_text(name * (300 + i))
    manifest = build_corpus(
        [str(tmp_path / "a"), str(tmp_path / "b")],
        load_tokenizer("bytes", None),
        tmp_path / "corpus",
        block_tokens=64,
        heldout_fraction=0.4,
        seed=5,
    )
    return tmp_path / "corpus", manifest


def test_each_source_is_measured_on_its_own_text(two_sources: tuple[Path, Any]) -> None:
    directory, manifest = two_sources
    a, b = rows_by_source(directory, manifest, 16, 640)
    assert (a.source, b.source) == manifest.sources
    assert len(a.rows) == len(b.rows) == 20
    assert (a.rows == ord("a")).float().mean() > 0.95
    assert (b.rows == ord("b")).float().mean() > 0.95
    assert a.weight + b.weight == pytest.approx(1)
    assert a.weight > b.weight
    assert mean_loss([1.0, 2.0], [3.0, 1.0]) == 1.25


def test_a_table_of_sources_that_is_not_the_corpus_s_is_refused(
    two_sources: tuple[Path, Any],
) -> None:
    directory, manifest = two_sources
    table = np.fromfile(directory / HELDOUT_SOURCES, dtype="<u8")
    table[1] += 1
    table.tofile(directory / HELDOUT_SOURCES)
    with pytest.raises(CorpusError, match="build the corpus again"):
        rows_by_source(directory, manifest, 16, 640)
    (directory / HELDOUT_SOURCES).unlink()  # a corpus from before the table
    (whole,) = rows_by_source(directory, manifest, 16, 640)
    assert whole.source == " + ".join(manifest.sources)


def test_measuring_keeps_the_model_as_it_was() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, **given: Any) -> Any:
            assert not self.training
            return SimpleNamespace(loss=self.w * given["input_ids"].float().mean())

    model = Model().train()
    rows = torch.cat([torch.zeros(32, 4), torch.ones(8, 4)]).long()
    assert heldout_loss(model, rows) == pytest.approx(2 * 8 / 40)
    assert model.training
    assert model.w.grad is None


def test_the_evaluator_runs_at_the_lowest_priority(
    make_site: Callable[[], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from talkoot.server.parts import evaluate_until

    asked: list[int] = []
    monkeypatch.setattr(os, "nice", asked.append)
    stop = threading.Event()
    stop.set()
    evaluate_until(make_site().coordinator, stop)
    assert asked == [19]
