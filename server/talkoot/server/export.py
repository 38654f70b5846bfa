"""``talkoot-coordinator export``: a version as an ordinary transformers model directory."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from sqlalchemy import select

from talkoot.protocol.errors import ConfigError, IntegrityError, StateError
from talkoot.protocol.files import explain_os_error
from talkoot.server.book import Book
from talkoot.server.coordinator import Coordinator
from talkoot.server.ledger.schema import Version


def export_version(coordinator: Coordinator, out: Path, number: int | None) -> Version:
    """Write a version to ``out``, whole or not at all.

    The directory loads with plain ``AutoModelForCausalLM.from_pretrained`` and
    ``AutoTokenizer.from_pretrained``, and carries ``talkoot.json``: which run, which version.
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
    card = {
        "run_id": coordinator.run_id,
        "version": version.version,
        "weights_digest": version.weights_digest,
        "parameters": coordinator.spec.parameters,
        "sequence_length": coordinator.spec.sequence_length,
    }
    (work / "talkoot.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
