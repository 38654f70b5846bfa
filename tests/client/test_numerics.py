"""A network of one node with nothing compressed is plain AdamW training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkoot.client.trainer.core import Trainer
from talkoot.protocol.messages import CodecSpec, InnerSpec
from talkoot.protocol.model import build_model, parse_config
from talkoot.protocol.payload import verify_payload
from talkoot.protocol.sequences import Sequences
from talkoot.protocol.weights import WeightsReader
from talkoot.server.aggregate import ContributionInput, VersionDir, aggregate_round, initial_state
from talkoot.server.outer import OuterSpec

if TYPE_CHECKING:
    from .conftest import RunFiles
else:
    RunFiles = Any

MakeRun = Callable[..., RunFiles]

ROUNDS = 6
DENSE = CodecSpec(kind="dense")
INNER = InnerSpec(learning_rate=1e-3)


def network(run: RunFiles, root: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Rounds of one inner step: (what the node trained to, what the network published)."""
    start = WeightsReader(run.weights, run.manifest)
    version = VersionDir(root / "v0")
    assert initial_state(run.manifest, start.get, version.path) == run.weights_digest
    trainer = Trainer(root / "node", "cpu")
    trainer.open(run.spec, *run.open_paths)
    trainer.sync(0, run.weights_digest, (0, run.weights), [])
    digest = run.weights_digest
    for number in range(ROUNDS):
        task, blocks = run.task(
            range(number, number + 1), version=number, digest=digest, round_number=number + 1
        )
        result = trainer.train(task, blocks)
        assert result["steps"] == 1
        assert trainer._replica is not None
        local = {name: p.clone() for name, p in trainer._replica.weights()}
        path = Path(result["payload_path"])
        facts = verify_payload(path, run.manifest, DENSE)
        closed = aggregate_round(
            run.manifest,
            version,
            [ContributionInput(path, result["tokens"], facts.l2_norm, "node")],
            DENSE,
            DENSE,
            OuterSpec(optimizer="sgd", learning_rate=1.0),
            root / f"v{number + 1}",
        )
        version, digest = closed.state, closed.weights_digest
        trainer.settle(task.lease.lease_id, accepted=True)
        trainer.sync(number + 1, digest, None, [closed.update_path])
        reader = WeightsReader(version.published, run.manifest)
        yield local, {name: reader.get(name) for name in reader.names()}


def plain(run: RunFiles) -> Iterator[dict[str, Tensor]]:
    """The same batches under torch's own AdamW, written out."""
    model = build_model(parse_config(run.open_paths[0].read_bytes()), seed=None, device="cpu")
    reader = WeightsReader(run.weights, run.manifest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.get(name))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": INNER.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=INNER.learning_rate,
        betas=(INNER.beta1, INNER.beta2),
        eps=INNER.epsilon,
        fused=True,
    )
    for number in range(ROUNDS):
        task, blocks = run.task(range(number, number + 1), round_number=number + 1)
        ids = Sequences(run.spec, run.corpus, task.lease, blocks).batch(0)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), INNER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


def ulp(x: Tensor) -> Tensor:
    """Distance from |x| to the next larger fp32."""
    return torch.nextafter(x.abs(), torch.tensor(torch.inf)) - x.abs()


def make_uncompressed_run(make_run: MakeRun) -> RunFiles:
    run = make_run(inner=INNER, uplink=DENSE, downlink=DENSE)
    run.spec = run.spec.model_copy(update={"micro_batch": 512 // 64})
    return run


def test_the_first_round_is_adamw_to_the_bit_wherever_the_difference_is_exact(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_uncompressed_run(make_run)
    before = WeightsReader(run.weights, run.manifest)
    local, published = next(network(run, tmp_path))
    adamw = next(plain(run))
    exact = total = 0
    for name, trained in adamw.items():
        assert torch.equal(local[name], trained)  # the inner step is AdamW's, to the bit
        old, new = before.get(name), published[name]
        # Sterbenz's lemma: P - L is exact when the two are within a factor of two, and then
        # P - (P - L) is L.
        close = (old * trained > 0) & (old.abs() <= 2 * trained.abs())
        close &= trained.abs() <= 2 * old.abs()
        assert torch.equal(new[close], trained[close])
        # Elsewhere P - L is rounded once, and so is P - (P - L): half an ulp each of numbers no
        # larger than |P| + |L|; the update and its application round twice more.
        assert ((new - trained).abs() <= 2 * ulp(old.abs() + trained.abs())).all()
        exact += int((new == trained).sum())
        total += new.numel()
    assert exact / total > 0.9


def test_a_network_of_one_node_follows_plain_adamw_for_six_rounds(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_uncompressed_run(make_run)
    worst = 0.0
    for (local, published), trained in zip(network(run, tmp_path), plain(run), strict=True):
        for name, expected in trained.items():
            # Each round rounds once more, and AdamW's next step sees the rounded weights.
            largest = float(expected.abs().max())
            worst = max(worst, float((published[name] - expected).abs().max()) / largest)
            worst = max(worst, float((local[name] - expected).abs().max()) / largest)
    eps = torch.finfo(torch.float32).eps
    print(f"largest difference relative to the largest weight of its tensor: {worst / eps:.1f} eps")
    assert worst < 16 * eps
