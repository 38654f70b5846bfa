"""``talkoot doctor``: what this machine has, what it can hold, and whom it can reach."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from talkoot.client.choice import MARGIN, held_against
from talkoot.client.enrol import Enrolment
from talkoot.client.hardware import measure_in_child
from talkoot.client.home import Home, Settings
from talkoot.client.neighbours import holders
from talkoot.protocol.memory import format_size
from talkoot.protocol.model import named_config
from talkoot.protocol.planner import plans
from talkoot.protocol.planner.choose import Fit, fastest, table, ways_to_fit
from talkoot.protocol.recipes import RECIPES


def examine(
    home: Home,
    settings: Settings,
    model: str | None,
    sequence_length: int,
    micro_batch: int,
) -> dict[str, Any]:
    """Measure; with ``model`` (a preset or a config.json) also hold it against what is needed.

    ``settings`` are those of the node that lives in ``home``, or would.
    """
    capability = measure_in_child(settings.device, settings.caps, home.root)
    others = holders(capability.device)
    findings: dict[str, Any] = {
        "capability": capability.model_dump(mode="json"),
        "device_users": [asdict(other) for other in others.device],
        "host_users": [asdict(other) for other in others.host],
        "model": model,
        "recipe": None,
        "recipes": None,
        "fits": None,
        "coordinator": _coordinator(home),
    }
    if model is None:
        return findings
    config = named_config(model)
    plans_of_all = [
        plans.quick(config, recipe, sequence_length=sequence_length, micro_batch=micro_batch)
        for recipe in RECIPES.values()
    ]
    fits = held_against(plans_of_all, capability)
    best = fastest(fits)
    findings["recipes"] = [_row(fit) for fit in fits]
    findings["recipe"] = None if best is None else best.recipe
    findings["ways_to_fit"] = [] if best is not None else ways_to_fit(fits, capability, others)
    findings["table"] = table(fits, capability.device)
    findings["fits"] = best is not None
    return findings


def _coordinator(home: Home) -> dict[str, Any] | None:
    """Whether the coordinator that this node trains for answers, and how fast."""
    if not home.enrolment.exists():
        return None
    import socket
    import time

    enrolment = Enrolment.load(home.enrolment)
    counters = home.counters()
    out: dict[str, Any] = {
        "host": enrolment.host,
        "link_down": counters.link_down,
        "link_up": counters.link_up,
    }
    ports = (("gateway", enrolment.gateway_port), ("transfer", enrolment.transfer_port))
    for name, port in ports:
        start = time.monotonic()
        try:
            socket.create_connection((enrolment.host, port), timeout=5).close()
            out[name] = {"port": port, "connect_seconds": time.monotonic() - start}
        except OSError as err:
            out[name] = {"port": port, "error": err.strerror or str(err)}
    return out


def print_findings(findings: dict[str, Any]) -> None:
    """The findings for people."""
    has = findings["capability"]
    print(f"device   {has['device']}: {has['device_name']}")
    print(
        f"  memory {format_size(has['device_free_bytes'])} free of "
        f"{format_size(has['device_total_bytes'])}"
    )
    for user in findings["device_users"]:
        size = user["bytes"]
        held = "memory that the driver does not tell" if size is None else format_size(size)
        print(f"  used by {user['name']} (process {user['pid']}): {held}")
    print(
        f"host     {has['cpu_count']} CPUs, {format_size(has['host_free_bytes'])} free of "
        f"{format_size(has['host_total_bytes'])}, disk {format_size(has['disk_free_bytes'])} free"
    )
    print(f"torch    {has['torch_version']}")
    link = findings["coordinator"]
    if link is not None:
        for name in ("gateway", "transfer"):
            port = link[name]
            told = port.get("error") or f"answers in {1000 * port['connect_seconds']:.0f} ms"
            print(f"{name:8} {link['host']}:{port['port']} {told}")
        rates = [f"{way} {format_size(int(rate))}/s" for way, rate in _rates(link)]
        if rates:
            print(f"line     {', '.join(rates)}, when this node last transferred something large")
    if findings["recipes"] is None:
        print("With --model NAME it says, too, whether a replica of that model fits.")
        return
    print(f"replica of {findings['model']} (with a margin of {MARGIN:g}):")
    for line in findings["table"]:
        print(f"  {line}")
    if findings["recipe"] is not None:
        print(f"The fastest that fits: {findings['recipe']}.")
        return
    print("No recipe fits. The cheapest ways to make one fit:")
    for number, way in enumerate(findings["ways_to_fit"], 1):
        print(f"  {number}. {way}")


def _rates(link: dict[str, Any]) -> list[tuple[str, float]]:
    known = (("down", link["link_down"]), ("up", link["link_up"]))
    return [(way, rate) for way, rate in known if rate is not None]


def _row(fit: Fit) -> dict[str, Any]:
    return {
        "recipe": fit.recipe,
        "device_bytes": fit.need.device,
        "host_bytes": fit.need.host,
        "disk_bytes": fit.need.disk,
        "lacks_device_bytes": fit.lacks_device,
        "lacks_host_bytes": fit.lacks_host,
        "lacks_disk_bytes": fit.lacks_disk,
        "fits": fit.fits,
        "source": fit.plan.source,
    }
