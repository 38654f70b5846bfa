"""Files of a node that a power cut or a bad disk has torn, emptied, changed or taken away."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.client.hostile.driver import Driver

from talkoot.client.home import Home
from talkoot.client.trainer.mend import believable
from talkoot.protocol.errors import TalkootError
from talkoot.sims.in_process import InProcessCoordinator, nano_state


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InProcessCoordinator, Driver]]:
    """A node with a lease behind it, and a copy of its home beside it."""
    root = tmp_path_factory.mktemp("torn")
    with InProcessCoordinator(nano_state(root / "made"), root / "state") as site:
        home = Home(root / "home")
        site.enrol(home, "ada")
        driver = Driver(home)
        driver.worker.prepare()
        assert driver.worker.execute(site.lease(driver.node_id)).accepted
        site.publish()
        driver.worker.close()
        shutil.copytree(home.root, root / "image")
        yield site, driver
        driver.trainer.close(timeout_seconds=10)


HOPELESS = {"identity.pem": "bad-key", "enrolment.json": "bad-enrolment"}
"""What a node is: without it there is none."""
TOLD = {"settings.json": "state", "work/state.json": "damaged"}
"""What is not guessed at when it is damaged; without the file a node begins anew."""


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    half = len(data) // 2
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"torn": data[:half], "zeroed": data[:half] + bytes(len(data) - half)}[how]
        )


def put_back(root: Path, image: Path) -> None:
    """The home as it was, but for locks and logs that processes have open."""
    for path in root.rglob("*"):
        if path.is_file() and path.name != "lock" and path.parent.name != "logs":
            path.unlink()
    ignore = shutil.ignore_patterns("lock", "logs")
    shutil.copytree(image, root, dirs_exist_ok=True, ignore=ignore)


@pytest.mark.parametrize("how", ["torn", "zeroed", "gone"])
def test_whatever_file_of_a_node_is_damaged_it_goes_on_or_says_which_in_a_sentence(
    how: str, node: tuple[InProcessCoordinator, Driver]
) -> None:
    site, driver = node
    root = driver.home.root
    image = root.parent / "image"
    files = [p.relative_to(image) for p in image.rglob("*") if p.is_file() and p.name != "lock"]
    names = sorted(str(p) for p in files if p.parts[0] != "logs")
    assert {"identity.pem", "counters.json", "work/state.json"} < set(names)
    assert sum(name.startswith("work/tensors/") for name in names) == 3
    assert sum(name.startswith("store/") for name in names) >= 4
    for name in names:
        put_back(root, image)
        damage(root / name, how)
        code = HOPELESS.get(name) or (None if how == "gone" else TOLD.get(name))
        if code is not None:
            with pytest.raises(TalkootError, match=re.escape(str(root / name))) as told:
                do_a_lease(site, driver)
            assert told.value.code == ("missing" if how == "gone" else code)
            continue
        assert do_a_lease(site, driver), name
        site.publish()


def do_a_lease(site: InProcessCoordinator, driver: Driver) -> bool:
    """As a new process of the node would; returns whether it was accepted."""
    driver.again(remember=True)
    driver.worker.prepare()
    return driver.worker.execute(site.lease(driver.node_id)).accepted


def test_moments_whose_squares_are_lost_are_not_believed_and_all_others_are() -> None:
    first, second = torch.tensor([0.0, 1e-20, -0.5, 0.2]), torch.tensor([0.0, 0.0, 1e-3, 1e-9])
    states = [("exp_avg:w", first), ("exp_avg_sq:w", second), ("scale:w", torch.zeros(1))]
    assert believable(states)
    second[3] = 0.0
    assert not believable(states)
    assert believable([("exp_avg:w", first), ("row:w", torch.zeros(2))]), "factored"
