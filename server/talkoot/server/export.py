"""``talkoot-coordinator export``: a version as an ordinary transformers model directory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from talkoot.protocol.errors import ConfigError, IntegrityError, StateError
from talkoot.protocol.files import explain_os_error
from talkoot.protocol.refusals import printable
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import ContributionRecord, Version
from talkoot.server.status import evaluation_of


def export_version(coordinator: Coordinator, out: Path, number: int | None) -> Version:
    """Write a version to ``out``, whole or not at all.

    The directory loads with plain ``AutoModelForCausalLM.from_pretrained`` and
    ``AutoTokenizer.from_pretrained``, and carries ``talkoot.json`` (which run, which version, what
    was measured of it) and the same for people in ``README.md``.
    """
    with coordinator.ledger.read() as session:
        if number is None:
            version = Book(coordinator).latest_version(session)
        else:
            found = session.scalars(
                select(Version).where(
                    Version.run_id == coordinator.run_id, Version.version == number
                )
            ).one_or_none()
            if found is None:
                raise ConfigError(f"There is no version {number} of run {coordinator.run_id}.")
            version = found
    out = out.absolute()
    if out.exists():
        raise StateError(f"{out} exists: choose another --out, or remove it.", code="exists")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as err:
        raise explain_os_error(err, "exporting", out) from err
    try:
        _write(coordinator, version, work)
        work.chmod(0o755)
        work.rename(out)
    except OSError as err:
        raise explain_os_error(err, "exporting", out) from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return version


def _write(coordinator: Coordinator, version: Version, work: Path) -> None:
    from transformers.utils import logging as transformers_logging

    from talkoot.protocol.model import build_model, parse_config
    from talkoot.protocol.tokenizer import load_tokenizer, save_for_export
    from talkoot.protocol.weights import WeightsReader

    transformers_logging.disable_progress_bar()  # one file's bar tells nobody anything
    path = coordinator.state.versions / version.directory / "published.safetensors"
    if not path.exists() and version.checkpoint_digest is not None:
        path = coordinator.store.path(version.checkpoint_digest)
    if not path.exists():
        raise ConfigError(
            f"The weights of version {version.version} are not kept any more: the newest versions "
            "and the checkpoints are."
        )
    data = coordinator.store.path(coordinator.spec.model.digest).read_bytes()
    model = build_model(parse_config(data), seed=None, device="cpu")
    with WeightsReader(path, coordinator.manifest) as weights:
        if weights.weights_digest() != version.weights_digest:
            raise IntegrityError(
                f"{path} is not what the ledger says version {version.version} is: restore the "
                "state directory from a backup."
            )
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights.get(name))
    model.save_pretrained(work)  # type: ignore[operator]  # a method of PreTrainedModel
    kind = coordinator.config.tokenizer.kind
    save_for_export(
        load_tokenizer(kind, coordinator.state.tokenizer if kind == "hf" else None), work
    )
    card: dict[str, Any] = {
        "run_id": coordinator.run_id,
        "version": version.version,
        "weights_digest": version.weights_digest,
        "parameters": coordinator.spec.parameters,
        "sequence_length": coordinator.spec.sequence_length,
    }
    with coordinator.ledger.read() as session:
        found = evaluation_of(session, coordinator.run_id, version.version)
        tokens, nodes = _work_done(session, coordinator.run_id, version.version)
    card |= {"tokens": tokens, "nodes": nodes, "evaluation": found}
    (work / "README.md").write_text(model_card(card, coordinator.corpus.sources), encoding="utf-8")
    (work / "talkoot.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _work_done(session: Session, run_id: str, version: int) -> tuple[int, int]:
    """Tokens that the version was trained on, and by how many nodes."""
    record = ContributionRecord
    tokens, nodes = session.execute(
        select(
            func.coalesce(func.sum(record.tokens), 0), func.count(record.node_id.distinct())
        ).where(record.run_id == run_id, record.version <= version)
    ).one()
    return int(tokens), int(nodes)


def model_card(card: dict[str, Any], sources: Sequence[str]) -> str:
    """The export's README: what it is, what it was trained on, how well it does, how to load it."""
    found = card["evaluation"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [talkoot]",
        "---",
        "",
        f"# {card['run_id']}, version {card['version']}",
        "",
        f"A causal language model of {card['parameters']:,} parameters, trained on "
        f"{card['tokens']:,} tokens by {card['nodes']} volunteers' machines with "
        "talkoot. Sequence length in training: "
        f"{card['sequence_length']}.",
        "",
        f"Text: {', '.join(printable(source) for source in sources)}.",
        "",
        f"Weights digest: `{card['weights_digest']}`.",
        "",
        "## Held-out loss",
        "",
    ]
    if found is None:
        lines.append("This version was not measured.")
    else:
        lines += [
            "Mean cross-entropy on text that no volunteer was given, nats per token.",
            "",
            "| source | loss | perplexity | tokens |",
            "|---|---|---|---|",
        ]
        rows = [("all", found)] if len(found["sources"]) != 1 else []
        rows += [(printable(row["source"]), row) for row in found["sources"]]
        lines += [
            f"| {name.replace('|', '/')} | {row['loss']:.4f} | {_number(row['perplexity'])} "
            f"| {row['tokens']:,} |"
            for name, row in rows
        ]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("this directory")',
        'tokenizer = AutoTokenizer.from_pretrained("this directory")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
