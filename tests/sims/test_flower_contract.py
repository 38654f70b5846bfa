"""What ``talkoot.sims.virtual.flower`` relies on in Flower.

When a new flwr breaks one of these, its name says what to mend. That messages do reach the nodes is
shown by ``test_run_engine.py``, on the real engine.
"""

from __future__ import annotations

import inspect

from flwr.app import Metadata
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.simulation import run_simulation
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from talkoot.sims.virtual.flower import hand_out


def test_flowers_engine_still_hands_out_by_the_function_that_ours_stands_in_for() -> None:
    """One of another name would be left in place, and take a core again."""
    theirs = inspect.signature(vce_api.add_messages_to_queue)
    assert list(theirs.parameters) == list(inspect.signature(hand_out).parameters)
    assert "add_messages_to_queue" in vce_api.run_api.__code__.co_names


def test_flowers_state_in_memory_still_says_which_messages_wait() -> None:
    state = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    ).state()
    with state.lock:
        assert dict(state.message_ins_store) == {}
    assert {"dst_node_id", "delivered_at"} <= set(dir(Metadata))


def test_flowers_engine_still_takes_what_we_tell_it() -> None:
    wanted = {"backend_name", "backend_config"}
    assert wanted <= set(inspect.signature(run_simulation).parameters)
