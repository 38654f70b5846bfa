"""``talkoot-coordinator init``: from a configuration to a whole state directory, or none."""

from __future__ import annotations

import ipaddress
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkoot.protocol.artifacts import ArtifactStore
from talkoot.protocol.corpus import MANIFEST, CorpusManifest
from talkoot.protocol.errors import ConfigError, TalkootError
from talkoot.protocol.files import DirectoryLock, explain_os_error, write_atomic
from talkoot.protocol.identity import NodeKey
from talkoot.protocol.messages import (
    AdapterSpec,
    ArtifactRef,
    CodecSpec,
    RunSpec,
    canonical_bytes,
)
from talkoot.server.ca import CertificateAuthority
from talkoot.server.config import Config, NetworkSection, begun, dump_config
from talkoot.server.coordinator import note
from talkoot.server.ledger import Ledger
from talkoot.server.ledger.schema import Run, Version
from talkoot.server.state import StateDir
from talkoot.server.trust import load_trust

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Identity:
    """Who a run is: its coordinator's key and its name. A simulation's come from its seed."""

    key: NodeKey
    run_id: str
    made_unix: float = field(default_factory=time.time)
    """When it begins, Unix seconds."""

    @classmethod
    def fresh(cls, name: str) -> Identity:
        """From the operating system's randomness, now."""
        return cls(NodeKey.generate(), f"{name[:50]}-{secrets.token_hex(4)}")


def init(root: Path, config: Config, *, say: Say, identity: Identity | None = None) -> str:
    """Make a state directory for a new run; returns the run id.

    Interrupted half-way it leaves a directory that ``serve`` and ``init`` refuse with a sentence.
    """
    config = with_free_ports(config)
    _model_config(config)  # what is wrong with it is told before the corpus is made
    state = StateDir(root.absolute())
    state.create()
    with DirectoryLock(state.root, who="coordinator"):  # outside: another init's work is not ours
        try:
            run_id = _fill(state, config, say, identity or Identity.fresh(config.run.name))
            state.finish(run_id)
        except TalkootError:
            shutil.rmtree(state.root, ignore_errors=True)
            raise
        except OSError as err:
            shutil.rmtree(state.root, ignore_errors=True)
            raise explain_os_error(err, "making the state directory", state.root) from err
    return run_id


def _fill(state: StateDir, config: Config, say: Say, identity: Identity) -> str:
    from talkoot.protocol.manifest import manifest_of
    from talkoot.protocol.model import config_bytes, named_trainable
    from talkoot.protocol.tokenizer import load_tokenizer
    from talkoot.server.aggregate import VersionDir, initial_state
    from talkoot.server.conductor import link_checkpoint
    from talkoot.server.corpus import build_corpus
    from talkoot.server.warm_up import warm_up

    say("Keys and certificate authority …")
    made = datetime.fromtimestamp(identity.made_unix, UTC)
    CertificateAuthority.create(state.ca, now=made)
    issue_loopback_certificate(state)
    key, run_id = identity.key, identity.run_id
    key.save(state.coordinator_key)

    if config.tokenizer.path is not None:
        _copy_tree(Path(config.tokenizer.path), state.tokenizer)
    tokenizer = load_tokenizer(
        config.tokenizer.kind, state.tokenizer if config.tokenizer.kind == "hf" else None
    )
    say(f"Corpus from {', '.join(config.corpus.sources)} …")
    corpus = build_corpus(
        config.corpus.sources,
        tokenizer,
        state.corpus,
        block_tokens=config.corpus.block_tokens,
        heldout_fraction=config.corpus.heldout_fraction,
        seed=config.run.seed,
        encoding=config.corpus.encoding,
    )
    say(
        f"  {corpus.documents:,} documents, {corpus.tokens:,} tokens in {corpus.block_count:,} "
        f"blocks; {corpus.heldout_documents:,} documents held out"
    )

    say("Model and first version …")
    model_config, model, get = streamed_model(config) or (*initial_model(config), None)
    _check_vocabulary(model_config, corpus)
    store = ArtifactStore(state.store)
    adapter = None
    if config.adapter.rank:
        adapter = _adapt(model_config, model, config, store, state)
        say(f"  base {adapter.base.digest[:12]}, {adapter.base.size_bytes:,} bytes")
    named = dict(named_trainable(model))
    manifest = manifest_of(named.items())
    spec = RunSpec(
        run_id=run_id,
        model=store.put_bytes(config_bytes(model_config)),
        manifest=store.put_bytes(manifest.to_bytes()),
        corpus=store.put_bytes((state.corpus / MANIFEST).read_bytes()),
        parameters=manifest.parameters,
        sequence_length=config.model.sequence_length,
        micro_batch=config.model.micro_batch,
        inner=begun(config),
        uplink=config.uplink,
        downlink=CodecSpec(**config.downlink.model_dump()),
        feedback_decay=config.feedback_decay,
        feedback_start=config.feedback_start,
        seed=config.run.seed,
        adapter=adapter,
    )
    get = get or (lambda name: named[name].detach())
    if config.warm_up.tokens:
        at = (state.corpus, corpus)
        get = warm_up(model_config, get, config, spec, at, say=say).__getitem__
    directory = "v00000000"
    first = VersionDir(state.versions / directory)
    digest = initial_state(manifest, get, first.path)
    checkpoint = link_checkpoint(store, first)
    signed = key.sign("RunSpec", canonical_bytes(spec))

    ledger = Ledger(Ledger.url_at(state.root, config.ledger.url))
    ledger.migrate()
    now = identity.made_unix
    with ledger.write() as session:
        session.add(
            Run(
                run_id=run_id,
                spec=canonical_bytes(signed).decode("ascii"),
                rounds_total=config.run.rounds,
                created_unix=now,
                finished_unix=None,
            )
        )
        session.flush()
        session.add(
            Version(
                run_id=run_id,
                version=0,
                weights_digest=digest,
                update_digest=None,
                update_bytes=None,
                checkpoint_digest=checkpoint.digest,
                checkpoint_bytes=checkpoint.size_bytes,
                directory=directory,
                published_unix=now,
            )
        )
        note(session, "made", f"Run {run_id}: {manifest.parameters:,} parameters.")
    ledger.close()
    write_atomic(state.config, dump_config(config).encode(), mode=0o600)
    say(f"Run {run_id}: {manifest.parameters:,} parameters, version 0 is {digest[:12]}")
    return run_id


def _adapt(
    model_config: dict[str, Any],
    model: torch.nn.Module,
    config: Config,
    store: ArtifactStore,
    state: StateDir,
) -> AdapterSpec:
    """Publish the model as the run's base, and give it the adapters of version 0."""
    from talkoot.protocol.adapters import adapt, base_manifest
    from talkoot.protocol.weights import save_weights

    section = config.adapter
    spec = AdapterSpec(
        rank=section.rank,
        alpha=section.alpha,
        targets=section.targets,
        base=ArtifactRef(digest="0" * 64, size_bytes=0),
        base_dtype=section.base_dtype,
    )
    frozen = base_manifest(model_config, spec)
    weights = dict(model.named_parameters())
    file = state.incoming / "base.safetensors"
    save_weights(file, frozen, lambda name: weights[name].to(_dtype(section.base_dtype)))
    spec = spec.model_copy(update={"base": store.put_file(file)})
    adapt(model, spec, config.run.seed)
    return spec


def _dtype(name: str) -> torch.dtype:
    from talkoot.protocol.replica import DTYPES

    return DTYPES[name]


def initial_model(config: Config) -> tuple[dict[str, Any], torch.nn.Module]:
    """The transformers config and the model of version 0, fp32. Raises :class:`ConfigError`."""
    from talkoot.protocol.model import build_model, load_pretrained

    if config.model.pretrained is not None:
        return load_pretrained(Path(config.model.pretrained))
    model_config = _model_config(config)
    return model_config, build_model(model_config, seed=config.run.seed, device="cpu")


def _model_config(config: Config) -> dict[str, Any]:
    from talkoot.protocol.model import parse_config, preset, read_config

    section = config.model
    if section.preset is not None:
        return preset(section.preset)
    if section.pretrained is not None:
        return read_config(Path(section.pretrained) / "config.json")
    path = Path(section.config or "")
    try:
        return parse_config(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"model.config: {path} cannot be read ({err.strerror}).") from err


def streamed_model(
    config: Config,
) -> tuple[dict[str, Any], torch.nn.Module, Callable[[str], torch.Tensor]] | None:
    """A pretrained model whose files hold its tensors one by one, shards or not: its config, an
    outline without memory, and what reads a tensor by name, as fp32. None for any other model.

    So version 0 of a model that is larger than the memory is copied from file to file.
    """
    from talkoot.protocol.model import build_model, named_trainable, read_config
    from talkoot.protocol.sharded import ShardedWeights

    if config.model.pretrained is None or config.adapter.rank:  # adapters look at the weights
        return None
    directory = Path(config.model.pretrained)
    model_config = read_config(directory / "config.json")
    outline = build_model(model_config, seed=None, device="cpu", meta=True)
    files = ShardedWeights(directory)
    if not files.holds({name: tuple(p.shape) for name, p in named_trainable(outline)}):
        return None
    return model_config, outline, lambda name: files.get(name).float()


def _check_vocabulary(model_config: dict[str, Any], corpus: CorpusManifest) -> None:
    vocabulary = int(model_config.get("vocab_size", 0))
    if vocabulary < corpus.tokenizer.vocab_size:
        raise ConfigError(
            f"The tokenizer has {corpus.tokenizer.vocab_size} ids and the model only knows "
            f"{vocabulary}: choose a model whose vocab_size is at least as large."
        )


def _copy_tree(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise ConfigError(f"tokenizer.path: {source} is not a directory.")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))


def with_free_ports(config: Config) -> Config:
    """Choose free ports where the configuration says 0; they stay the same from then on."""
    network = config.network
    chosen: dict[str, Any] = network.model_dump()
    taken: list[socket.socket] = []
    try:
        for name in ("gateway_port", "transfer_port", "superlink_port"):
            if chosen[name] == 0:
                # 0.0.0.0 for all: a port that is free on every address is free on loopback, too.
                free = socket.socket()
                free.bind(("0.0.0.0", 0))  # noqa: S104 - only to find a number
                taken.append(free)
                chosen[name] = free.getsockname()[1]
    finally:
        for one in taken:
            one.close()
    return config.model_copy(update={"network": NetworkSection(**chosen)})


def issue_server_certificate(
    state: StateDir, config: Config, *, keep_key: bool = False
) -> tuple[Path, Path]:
    """A fresh certificate for gateway and transfer service; returns (cert, key).

    Args:
        keep_key: for servers that are running and take up the new certificate by themselves: they
            must never see a key and a certificate that do not belong together.
    """
    names, ips = [], []
    with suppress(ValueError):
        ips.append(str(ipaddress.ip_address(config.network.public_host)))
    if not ips:
        names.append(config.network.public_host)
    cert_path, key_path = state.tls / "server.pem", state.tls / "server.key"
    key = NodeKey.load(key_path) if keep_key else NodeKey.generate()
    certificate = load_trust(state.ca).serving.issue_server(names, ips, key)
    write_atomic(key_path, key.private_pem(), mode=0o600)
    write_atomic(cert_path, certificate, mode=0o600)
    return cert_path, key_path


def issue_loopback_certificate(state: StateDir) -> tuple[Path, Path]:
    """A fresh certificate for the SuperLink, of its own CA; returns (cert, key)."""
    folder = state.loopback_ca.parent
    if state.loopback_ca.exists():
        authority = CertificateAuthority.load(folder)
    else:
        authority = CertificateAuthority.create(folder)
    key = NodeKey.generate()
    cert_path, key_path = folder / "superlink.pem", folder / "superlink.key"
    write_atomic(key_path, key.private_pem(), mode=0o600)
    write_atomic(cert_path, authority.issue_server([], [], key), mode=0o600)
    return cert_path, key_path
