"""What a node refuses to be told: each attack of TUF's list has its own answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.client.fresh import Seen, see_head, see_task, see_version
from talkoot.protocol.errors import IntegrityError
from talkoot.protocol.messages import (
    ArtifactRef,
    BlockRef,
    Head,
    Lease,
    RoundTask,
    VersionRef,
    VersionStatement,
)

RUN = "a-run"
NOW = 1_800_000_000.0
DIGEST = "a" * 64
OTHER = "b" * 64


def head(version: int = 5, **changes: object) -> Head:
    fields: dict[str, object] = {
        "run_id": RUN,
        "generation": 7,
        "version": version,
        "weights_digest": DIGEST,
        "trust_serial": 1,
        "issued_unix": NOW,
        "expires_unix": NOW + 600,
    }
    return Head.model_validate({**fields, **changes})


def ref(version: int, digest: str = DIGEST) -> VersionRef:
    return VersionRef(
        version=version,
        weights_digest=digest,
        checkpoint_version=version,
        checkpoint=ArtifactRef(digest=digest, size_bytes=1),
        updates_from=version,
        updates=(),
    )


def task(
    number: int = 6, attempt: int = 0, base: int | None = None, **changes: object
) -> RoundTask:
    lease = Lease(
        lease_id="c" * 32,
        run_id=RUN,
        round=number,
        attempt=attempt,
        node_id="d" * 16,
        blocks=(BlockRef(epoch=0, block=0),),
        tokens=1,
    )
    fields: dict[str, object] = {
        "run_id": RUN,
        "generation": 7,
        "round": number,
        "lease": lease,
        "base": ref(number - 1 if base is None else base),
        "tokens_before": 0,
        "tokens_round": 1,
        "issued_unix": NOW,
        "deadline_unix": NOW + 60,
        "expires_unix": NOW + 3600,
        "poll_seconds": 1.0,
    }
    return RoundTask.model_validate({**fields, **changes})


SEEN = see_task(see_head(Seen(), head(), RUN, NOW), task(attempt=1), RUN, NOW)


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (lambda: see_head(SEEN, head(4), RUN, NOW), "rolled-back"),
        (lambda: see_head(SEEN, head(6, generation=6), RUN, NOW), "rolled-back"),
        (lambda: see_head(SEEN, head(), RUN, NOW + 901), "stale"),
        (lambda: see_head(SEEN, head(), RUN, NOW - 301), "from-the-future"),
        (lambda: see_head(SEEN, head(weights_digest=OTHER), RUN, NOW), "forked"),
        (lambda: see_head(SEEN, head(run_id="other"), RUN, NOW), "wrong-run"),
        (lambda: see_task(SEEN, task(attempt=0), RUN, NOW), "replayed-task"),
        (lambda: see_task(SEEN, task(5), RUN, NOW), "replayed-task"),
        (lambda: see_task(SEEN, task(7, base=4), RUN, NOW), "replayed-task"),
        (lambda: see_task(SEEN, task(7, base=7), RUN, NOW), "forked"),
        (
            lambda: see_task(
                SEEN, task(attempt=2, base=5).model_copy(update={"base": ref(5, OTHER)}), RUN, NOW
            ),
            "forked",
        ),
        (lambda: see_task(SEEN, task(7, generation=6), RUN, NOW), "rolled-back"),
        (lambda: see_task(SEEN, task(7), RUN, NOW + 4000), "stale"),
        (lambda: see_task(SEEN, task(7), "other", NOW), "wrong-run"),
    ],
)
def test_each_attack_is_refused_by_its_name(attack: Callable[[], Seen], code: str) -> None:
    with pytest.raises(IntegrityError) as refused:
        attack()
    assert refused.value.code == code


def test_what_is_shown_again_changes_nothing_and_what_is_newer_is_taken() -> None:
    assert see_head(SEEN, head(), RUN, NOW + 899) == SEEN
    assert see_task(SEEN, task(attempt=1), RUN, NOW) == SEEN
    newer = see_head(SEEN, head(6, weights_digest=OTHER), RUN, NOW)
    assert (newer.version, newer.weights_digest, newer.round) == (6, OTHER, 6)


def test_only_a_higher_generation_may_go_back_and_then_the_old_one_is_not_believed() -> None:
    restored = see_head(SEEN, head(2, generation=8, weights_digest=OTHER), RUN, NOW)
    assert restored == Seen(8, 2, OTHER)
    assert (
        see_task(
            restored, task(3, generation=8).model_copy(update={"base": ref(2, OTHER)}), RUN, NOW
        ).round
        == 3
    )
    with pytest.raises(IntegrityError):
        see_head(restored, head(9), RUN, NOW)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=30))
def test_no_order_of_statements_takes_a_node_back_within_a_generation(
    shown: list[tuple[int, int]],
) -> None:
    seen = Seen()
    for generation, version in shown:
        digest = f"{generation:032x}{version:032x}"
        statement = VersionStatement(
            run_id=RUN,
            generation=generation,
            ref=ref(version, digest),
            issued_unix=NOW,
            expires_unix=NOW + 1,
        )
        before = seen
        try:
            seen = see_version(seen, statement, RUN, NOW)
        except IntegrityError:
            assert (generation, version) < (before.generation, before.version)
        assert (seen.generation, seen.version) >= (before.generation, before.version)
