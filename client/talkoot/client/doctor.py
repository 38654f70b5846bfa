"""``talkoot doctor``: what this machine has, what it can hold, and whom it can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talkoot.client.enrol import Enrolment
from talkoot.client.hardware import measure_in_child
from talkoot.client.home import Home
from talkoot.protocol.errors import ConfigError
from talkoot.protocol.memory import format_size, predict
from talkoot.protocol.model import parse_config, preset


def examine(
    home: Home,
    device: str | None,
    max_memory: int | None,
    model: str | None,
    sequence_length: int,
    micro_batch: int,
) -> dict[str, Any]:
    """Measure; with ``model`` (a preset or a config.json) also hold it against what is needed."""
    where = home.root if home.root.exists() else Path.cwd()
    capability = measure_in_child(device, max_memory, where)
    findings: dict[str, Any] = {
        "capability": capability.model_dump(mode="json"),
        "model": model,
        "needs": None,
        "fits": None,
        "coordinator": _coordinator(home),
    }
    if model is None:
        return findings
    plan = predict(_config(model), sequence_length, micro_batch)
    on_device = plan.device_bytes + (plan.host_bytes if capability.device == "cpu" else 0)
    findings["needs"] = {
        "device_bytes": on_device,
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
        "breakdown": dict(plan.breakdown),
        "recipe": "fp32-adamw",
    }
    findings["fits"] = (
        on_device <= capability.device_free_bytes
        and plan.disk_bytes <= capability.disk_free_bytes
        and (capability.device == "cpu" or plan.host_bytes <= capability.host_free_bytes)
    )
    return findings


def _config(model: str) -> dict[str, Any]:
    path = Path(model)
    if not path.suffix and not path.exists():
        return preset(model)
    try:
        return parse_config(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"{path} cannot be read as a model config ({err.strerror}).") from err


def _coordinator(home: Home) -> dict[str, Any] | None:
    """Whether the coordinator that this node trains for answers, and how fast."""
    if not home.enrolment.exists():
        return None
    import socket
    import time

    enrolment = Enrolment.load(home.enrolment)
    out: dict[str, Any] = {"host": enrolment.host}
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
    needs = findings["needs"]
    if needs is None:
        return
    print(f"replica of {findings['model']} under {needs['recipe']}:")
    print(
        f"  needs  {format_size(needs['device_bytes'])} on the device, "
        f"{format_size(needs['disk_bytes'])} of disk"
    )
    print("  fits" if findings["fits"] else "  does not fit")
