"""A node takes the fastest recipe that fits, keeps it, and shows it anew when it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talkoot.client.caps import OVER_MAX_DISK, Caps
from talkoot.client.choice import Choice, basis, choose, held_against
from talkoot.client.hardware import disk_room
from talkoot.client.home import Home, Settings
from talkoot.client.trainer_host import TrainerHost
from talkoot.client.worker import Worker
from talkoot.protocol.errors import CapacityError
from talkoot.protocol.files import bytes_below
from talkoot.protocol.memory import MemoryPlan, predict
from talkoot.protocol.messages import Capability
from talkoot.protocol.model import preset
from talkoot.protocol.planner import plans
from talkoot.protocol.recipes import ADAPTER_RECIPES, RECIPES, Recipe
from talkoot.server.ledger.schema import ProofRecord
from talkoot.sims.in_process import InProcessCoordinator, nano_state

GIB = 2**30
SPEC = "0" * 64


def machine(**change: object) -> Capability:
    has: dict[str, object] = {
        "device": "cuda",
        "device_name": "one",
        "device_total_bytes": 80 * GIB,
        "device_free_bytes": 79 * GIB,
        "host_total_bytes": 256 * GIB,
        "host_free_bytes": 256 * GIB,
        "disk_free_bytes": 999 * GIB,
        "cpu_count": 8,
        "torch_version": "2",
        "talkoot_version": "0",
        "device_physical_bytes": 80 * GIB,
        "host_physical_bytes": 256 * GIB,
    }
    return Capability.model_validate({**has, **change})


def llama() -> list[MemoryPlan]:
    config = preset("llama-2-7b")
    return [plans.quick(config, r, sequence_length=2048, micro_batch=1) for r in RECIPES.values()]


def anything(_recipe: Recipe) -> None:
    return None


def choice(has: Capability, pinned: str | None = None, kept: str | None = None) -> Choice:
    on = basis(has, Caps(), SPEC, pinned)
    return choose(held_against(llama(), has), has, on, pinned=pinned, kept=kept)


@pytest.mark.parametrize(
    ("free_gib", "first"),
    [(79, "bf16-adamw"), (46, "bf16-backward-adamw"), (31, "bf16-backward-adamw8"),
     (23, "bf16-backward-adamw4")],
)  # fmt: skip
def test_of_a_7b_model_each_card_takes_the_fastest_recipe_that_fits(
    free_gib: int, first: str
) -> None:
    has = machine(device_free_bytes=free_gib * GIB)
    made = choice(has)
    assert made.recipes[0] == first
    fits = {fit.recipe for fit in held_against(llama(), has) if fit.fits}
    assert set(made.recipes) == fits
    assert first in made.sentence


def test_a_pinned_recipe_comes_first_and_is_refused_with_the_table_where_it_does_not_fit() -> None:
    assert choice(machine(), pinned="bf16-backward-adafactor").recipes[:2] == (
        "bf16-backward-adafactor",
        "bf16-adamw",
    )
    with pytest.raises(CapacityError) as refused:
        choice(machine(), pinned="fp32-adamw")
    head, *table = refused.value.sentence.splitlines()
    assert head.startswith("--recipe fp32-adamw does not fit this machine: ")
    assert {line.split()[0] for line in table[1:]} == set(RECIPES)
    with pytest.raises(CapacityError, match="This run has no recipe 'lora-bf16'"):
        choice(machine(), pinned="lora-bf16")


def test_where_nothing_fits_the_refusal_is_the_coordinators() -> None:
    with pytest.raises(CapacityError, match="No recipe for a replica of this model fits") as no:
        choice(machine(device_free_bytes=4 * GIB, host_free_bytes=4 * GIB))
    assert no.value.code == "too-little-memory"


def test_what_other_programs_hold_does_not_change_a_choice_that_was_proved() -> None:
    tight = machine(device_free_bytes=23 * GIB)
    assert basis(tight, Caps(), SPEC, None) == basis(machine(), Caps(), SPEC, None)
    assert choice(tight, kept="bf16-adamw").recipes[0] == "bf16-adamw"
    assert choice(machine(), kept="bf16-backward-adamw4").recipes[0] == "bf16-backward-adamw4"


def test_a_model_that_nobody_knows_is_answered_by_the_formula_at_once() -> None:
    config = preset("mistral-7b")
    made = [plans.quick(config, r, sequence_length=333, micro_batch=3) for r in RECIPES.values()]
    assert {plan.source for plan in made} == {"formula"}


@given(
    st.sampled_from(
        [
            {"driver": "2"}, {"device_name": "two"}, {"device_physical_bytes": 40 * GIB},
            {"torch_version": "3"}, {"bf16": False}, {"host_physical_bytes": GIB},
            {"vram": 1}, {"ram": 1}, {"disk": 1}, {"model": "1" * 64}, {"recipe": "bf16-adamw"},
        ]
    )
)  # fmt: skip
def test_hardware_driver_caps_model_and_wish_are_what_a_proof_rests_on(
    change: dict[str, object],
) -> None:
    caps = Caps(**{k: 1 for k in change if k in ("vram", "ram", "disk")})
    model = str(change.get("model", SPEC))
    pinned = str(change["recipe"]) if "recipe" in change else None
    fields = Capability.model_fields
    has = machine(**{k: v for k, v in change.items() if k in fields})
    assert basis(has, caps, model, pinned) != basis(machine(), Caps(), SPEC, None)


def test_a_recipe_whose_package_is_not_installed_is_not_chosen() -> None:
    config, has = preset("tiny"), machine()
    made = [
        predict(config, 64, 1, recipe=RECIPES["fp32-adamw"]),
    ]
    assert "qlora-nf4" in ADAPTER_RECIPES
    fits = held_against(made, has, lambda recipe: f"needs {recipe.name}")
    assert [fit.why_not for fit in fits] == ["needs fp32-adamw"]
    with pytest.raises(CapacityError):
        choose(fits, has, SPEC, pinned=None, kept=None)


def test_a_nodes_own_files_are_room_that_it_has_and_the_cap_is_the_size_of_its_disk(
    tmp_path: Path,
) -> None:
    (tmp_path / "work").mkdir()
    free, _ = disk_room(tmp_path, None)
    (tmp_path / "work" / "replica").write_bytes(bytes(2**20))
    assert abs(disk_room(tmp_path, None)[0] - free) < 2**28  # others write here, too
    assert disk_room(tmp_path, 2**20)[0] == 2**20
    assert disk_room(tmp_path / "not" / "there", None)[0] > 0


def test_settings_of_before_the_caps_had_names_of_their_own_are_read(tmp_path: Path) -> None:
    home = Home(tmp_path)
    old = {"device": "cpu", "max_memory_bytes": 7, "checkpoint_seconds": 5.0}
    home.settings_path.write_text(json.dumps(old))
    assert home.settings().caps == Caps(vram=7, ram=7)
    home.save(home.settings_path, Settings(max_vram_bytes=1, recipe="bf16-adamw"))
    assert home.settings() == Settings(max_vram_bytes=1, recipe="bf16-adamw")


# With a coordinator ------------------------------------------------------------------------------


@dataclass
class Node:
    """A node of a network, whose daemon can be started again."""

    site: InProcessCoordinator
    home: Home
    node_id: str
    said: list[str] = field(default_factory=list)
    trainer: TrainerHost | None = None

    def start(self, **settings: object) -> Worker:
        if self.trainer is not None:
            self.trainer.close()
        self.home.save(self.home.settings_path, Settings.model_validate(
            {"device": "cpu", "threads": 1, "checkpoint_seconds": 0.01, **settings}
        ))  # fmt: skip
        self.trainer = TrainerHost.of(self.home)
        worker = Worker(self.home, self.trainer, self.said.append)
        worker.prepare()
        return worker

    def proofs(self) -> int:
        with self.site.coordinator.ledger.read() as session:
            return session.query(ProofRecord).filter_by(node_id=self.node_id).count()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano_state(tmp_path_factory.mktemp("choice"))


@pytest.fixture
def site(state: Path, tmp_path: Path) -> Iterator[InProcessCoordinator]:
    with InProcessCoordinator(state, tmp_path / "operator") as site:
        yield site


@pytest.fixture
def node(site: InProcessCoordinator, tmp_path: Path) -> Iterator[Node]:
    home = Home(tmp_path / "home")
    made = Node(site, home, site.enrol(home, "ada", admitted=False).node_id)
    yield made
    if made.trainer is not None:
        made.trainer.close()


def test_a_node_trains_by_the_recipe_that_it_was_told_and_proves_again_when_its_wish_changes(
    node: Node,
) -> None:
    worker = node.start(recipe="bf16-backward-adafactor")
    assert worker.recipe == "bf16-backward-adafactor"
    assert not worker.is_proved
    assert worker.prove().accepted
    assert worker.is_proved
    assert worker.execute(node.site.lease(node.node_id)).accepted
    worker.close()

    worker = node.start(recipe="bf16-backward-adafactor")
    assert worker.is_proved
    worker.close()

    worker = node.start()
    assert worker.recipe == "fp32-adamw"
    assert not worker.is_proved
    assert worker.execute(node.site.lease(node.node_id)).accepted
    assert worker.is_proved  # after the lease, as there was no daemon to do it before
    assert node.proofs() == 2
    worker.close()


def test_a_cap_is_another_machine_and_one_that_is_too_small_is_refused_with_a_way_out(
    node: Node,
) -> None:
    worker = node.start()
    assert worker.prove().accepted
    worker.close()
    worker = node.start(max_ram_bytes=4 * GIB)
    assert not worker.is_proved
    worker.close()
    with pytest.raises(CapacityError, match=r"raise --max-disk to \d+MiB") as refused:
        node.start(max_disk_bytes=2**20)
    assert refused.value.code == "too-little-disk"


def test_where_the_coordinator_wants_more_room_the_node_steps_down_by_itself(node: Node) -> None:
    worker = node.start()
    assert worker._choice is not None
    names = worker._choice.recipes
    real = worker.transfer.prove
    refusals = iter([True, False])

    def strict(signed: object) -> object:
        verdict = real(signed)  # type: ignore[arg-type]
        if next(refusals):
            return verdict.model_copy(update={"accepted": False, "code": "too-little-memory"})
        return verdict

    worker.transfer.prove = strict  # type: ignore[assignment, method-assign]
    assert worker.prove().accepted
    assert (names[0], worker.recipe) == ("fp32-adamw", names[1])
    assert node.said[-1].endswith(f"Trying {names[1]} instead.")
    worker.close()
    assert node.start().recipe == names[1]


def test_a_cap_on_disk_that_is_reached_in_a_lease_ends_it_with_the_work_kept(node: Node) -> None:
    worker = node.start()
    assert worker.prove().accepted
    assert worker.execute(node.site.lease(node.node_id)).accepted
    held = bytes_below(node.home.root)
    node.home.save(node.home.settings_path, Settings(
        device="cpu", threads=1, checkpoint_seconds=0.01, max_disk_bytes=held + 2**16
    ))  # fmt: skip
    assert node.trainer is not None
    node.trainer.close()
    # As if files had grown since the choice: the plan's own sum would not have let it begin.
    worker.trainer = node.trainer = TrainerHost.of(node.home)
    worker._open(worker._choice)  # type: ignore[arg-type]
    task = node.site.lease(node.node_id)
    with pytest.raises(CapacityError, match="raise it with 'talkoot join --max-disk'") as refused:
        worker.execute(task)
    assert refused.value.code == OVER_MAX_DISK
    assert bytes_below(node.home.root) <= held + 2**16
    worker.close()

    worker = node.start()
    assert worker.execute(task).accepted
    worker.close()


def test_nothing_is_fetched_that_would_be_over_the_cap_on_disk(node: Node) -> None:
    worker = node.start()
    worker._settings = worker._settings.model_copy(
        update={"max_disk_bytes": bytes_below(node.home.root) + 2**10}
    )
    assert worker.prove().accepted
    task = node.site.lease(node.node_id)
    before = worker.meter.bytes_down
    with pytest.raises(CapacityError) as refused:
        worker.execute(task)
    assert refused.value.code == OVER_MAX_DISK
    assert worker.meter.bytes_down - before < 2**14
    worker.close()
