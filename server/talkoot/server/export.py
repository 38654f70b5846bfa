"""``talkoot-coordinator export``: a version as an ordinary transformers model directory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from talkoot.protocol.errors import ConfigError, IntegrityError, StateError
from talkoot.protocol.files import explain_os_error
from talkoot.protocol.refusals import printable
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import ContributionRecord, Version
from talkoot.server.status import evaluation_of

if TYPE_CHECKING:
    from torch import Tensor

    from talkoot.protocol.messages import AdapterSpec
    from talkoot.protocol.weights import WeightsReader


def export_version(
    coordinator: Coordinator, out: Path, number: int | None, *, merge: bool = False
) -> Version:
    """Write a version to ``out``, whole or not at all.

    An adapter run's version is written as adapters, which PEFT loads beside the base model, or,
    with ``merge``, added to their base as one model. A model's directory loads with plain
    ``AutoModelForCausalLM.from_pretrained``. Either has the tokenizer for
    ``AutoTokenizer.from_pretrained``, and carries ``talkoot.json`` (which run, which version, what
    was measured of it) and the same for people in ``README.md``.

    Raises:
        ConfigError: there is no such version, or nothing to merge.
        StateError: ``out`` exists.
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
    if merge and coordinator.spec.adapter is None:
        raise ConfigError(
            f"Run {coordinator.run_id} trains the whole model, so there is nothing to merge: leave "
            "out --merge."
        )
    out = out.absolute()
    if out.exists():
        raise StateError(f"{out} exists: choose another --out, or remove it.", code="exists")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as err:
        raise explain_os_error(err, "exporting", out) from err
    try:
        _write(coordinator, version, work, merge)
        work.chmod(0o755)
        work.rename(out)
    except OSError as err:
        raise explain_os_error(err, "exporting", out) from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return version


def _write(coordinator: Coordinator, version: Version, work: Path, merge: bool) -> None:
    from transformers.utils import logging as transformers_logging

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
    with WeightsReader(path, coordinator.manifest) as weights:
        if weights.weights_digest() != version.weights_digest:
            raise IntegrityError(
                f"{path} is not what the ledger says version {version.version} is: restore the "
                "state directory from a backup."
            )
        if coordinator.spec.adapter is None or merge:
            _write_model(coordinator, weights, work)
        else:
            _write_adapters(coordinator, coordinator.spec.adapter, weights, work)
    kind = coordinator.config.tokenizer.kind
    save_for_export(
        load_tokenizer(kind, coordinator.state.tokenizer if kind == "hf" else None), work
    )
    adapter = coordinator.spec.adapter
    card: dict[str, Any] = {
        "run_id": coordinator.run_id,
        "version": version.version,
        "weights_digest": version.weights_digest,
        "parameters": coordinator.spec.model_parameters,
        "adapter": adapter.model_dump(mode="json") if adapter is not None else None,
        "merged": merge,
        "sequence_length": coordinator.spec.sequence_length,
    }
    with coordinator.ledger.read() as session:
        found = evaluation_of(session, coordinator.run_id, version.version)
        tokens, nodes = _work_done(session, coordinator.run_id, version.version)
    card |= {"tokens": tokens, "nodes": nodes, "evaluation": found}
    (work / "README.md").write_text(model_card(card, coordinator.corpus.sources), encoding="utf-8")
    (work / "talkoot.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _write_model(coordinator: Coordinator, weights: WeightsReader, work: Path) -> None:
    """The whole model, as ``save_pretrained`` has it."""
    from talkoot.protocol.adapters import merged, open_base
    from talkoot.protocol.model import build_model, parse_config

    spec = coordinator.spec
    config = parse_config(coordinator.store.path(spec.model.digest).read_bytes())
    model = build_model(config, seed=None, device="cpu")
    parameters = dict(model.named_parameters())
    tensors: Iterable[tuple[str, Tensor]]
    if spec.adapter is None:
        tensors = ((name, weights.get(name)) for name in parameters)
    else:
        base = open_base(config, spec.adapter, coordinator.base)
        tensors = merged(config, spec.adapter, base, weights.get)
    for name, tensor in tensors:
        parameters[name].data.copy_(tensor)
    model.save_pretrained(work)  # type: ignore[operator]  # a method of PreTrainedModel


def _write_adapters(
    coordinator: Coordinator, adapter: AdapterSpec, weights: WeightsReader, work: Path
) -> None:
    """The adapters in PEFT's format (its ``save_pretrained``): two files."""
    from safetensors.torch import save_file

    matrices = {}
    for name in weights.names():
        layer, _, matrix = name.rpartition(".")
        matrices[f"base_model.model.{layer}.{matrix}.weight"] = weights.get(name)
    save_file(matrices, work / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": coordinator.config.model.pretrained,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (work / "adapter_config.json").write_text(
        json.dumps(described, indent=2) + "\n", encoding="utf-8"
    )


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
    adapter = card.get("adapter")
    alone = adapter is not None and not card["merged"]
    what = "A causal language model of"
    if adapter is not None:
        what = f"{'Adapters' if alone else 'Adapters merged into their base'} (LoRA, rank "
        what += f"{adapter['rank']}): a causal language model of"
    lines = [
        "---",
        f"library_name: {'peft' if alone else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [talkoot]",
        "---",
        "",
        f"# {card['run_id']}, version {card['version']}",
        "",
        f"{what} {card['parameters']:,} parameters, trained on "
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
    loads = "AutoModelForCausalLM.from_pretrained("
    loads = "PeftModel.from_pretrained(base, " if alone else loads
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(
            (
                "from peft import PeftModel",
                'base = AutoModelForCausalLM.from_pretrained("the base")',
            )
            if alone
            else ()
        ),
        f'model = {loads}"this directory")',
        'tokenizer = AutoTokenizer.from_pretrained("this directory")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
