"""docs/surface.md is what answers: each table against the code that serves."""

from __future__ import annotations

import re
from pathlib import Path

from talkoot.protocol.wire.transfer_pb2 import DESCRIPTOR
from talkoot.server import http_edge, transfer
from talkoot.server.config import NetworkSection
from talkoot.server.gateway import Gateway, GatewayLimits

PAGE = Path(__file__).resolve().parent.parent / "docs" / "surface.md"


def table(title: str) -> list[list[str]]:
    """The rows below a heading of the page, by column; code spans without their ticks."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    rows = [line.strip("|").split("|") for line in found[1].splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


class Nobody:
    """A backend that is never asked."""

    def __getattr__(self, name: str) -> object:
        return lambda: b""


def test_the_page_lists_every_route_of_the_gateway_and_no_other() -> None:
    gateway = Gateway(Nobody(), "https://127.0.0.1:1", b"")  # type: ignore[arg-type]
    served = {f"{method} {path.decode()}" for method, path in gateway.routes}
    assert [row[0] for row in table("Gateway")] == sorted(
        served, key=[row[0] for row in table("Gateway")].index
    )
    rates = {row[3] for row in table("Gateway")}
    assert rates <= set(GatewayLimits.__dataclass_fields__)


def test_the_page_gives_the_gateways_rates_as_they_are() -> None:
    told = {row[0]: (float(row[1]), float(row[2])) for row in table("Rates of the gateway")}
    assert told == vars(GatewayLimits())


def test_the_page_lists_every_method_of_the_transfer_service_with_its_quota() -> None:
    methods = {method.name for method in DESCRIPTOR.services_by_name["Transfer"].methods}
    rows = {row[0]: row for row in table("Transfer service")}
    assert set(rows) == methods
    quotas = {name: (float(r[2]), float(r[3])) for name, r in rows.items()}
    assert quotas == dict(transfer.QUOTAS)
    said = f"{transfer.MAX_STREAMS_PER_NODE} streams at once"
    assert {name for name, row in rows.items() if said in row[1]} == set(transfer.STREAMS)


def test_the_page_gives_connections_and_times_as_they_are() -> None:
    network = NetworkSection()
    known = {**vars(http_edge), **vars(transfer), **network.model_dump()}
    for name, value, _ in table("Connections and time"):
        assert float(value) == known[name], name
