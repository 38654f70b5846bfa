"""What the pictures of a run show, from its tables: shares by class, a round's nodes, its liars.

Pure: rows as ``run.json``, ``leases.csv`` and ``presence.csv`` have them, times in virtual seconds
since the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from talkoot.sims.panels import F64, Strip, some_of

BINS: Final = 160
"""Of a heat map: some twelve hundred pixels."""
ACCEPTED: Final = "accepted"
GIVEN_UP: Final = "given-up"
Row = Mapping[str, Any]
Span = tuple[float, float]


# Who trains, when ---------------------------------------------------------------------------------


def shares_by_class(
    classes: Sequence[str], leases: Iterable[Row], present: Iterable[Row], end: float
) -> tuple[F64, F64]:
    """Share of a class's time online that goes into training that counted, over time.

    Args:
        classes: names, one a row of the answer.
        leases: all.
        present: when each node was there.
        end: of the time axis, seconds.

    Returns:
        Edges of bins (k + 1,), and shares (classes, k); NaN where nobody was there.
    """
    bins = np.linspace(0.0, max(end, 1e-9), BINS + 1)
    here = spans_of(present)
    trained, online = (np.zeros((len(classes), BINS)) for _ in range(2))
    places = {name: place for place, name in enumerate(classes)}
    kinds = {row["node"]: row["population"] for row in present}
    for place, name in enumerate(classes):
        spans = [span for node, mine in here.items() if kinds[node] == name for span in mine]
        online[place] = seconds_in(bins, spans)
    work: list[list[Span]] = [[] for _ in classes]
    for lease in leases:
        begin, until = lease["fetched"], lease["trained"]
        if lease["answer"] == ACCEPTED and lease["population"] in places:
            mine = here.get(lease["node"], [(begin, until)])
            work[places[lease["population"]]] += cut((begin, until), mine)
    for place, spans in enumerate(work):
        trained[place] = seconds_in(bins, spans)
    with np.errstate(invalid="ignore", divide="ignore"):
        return bins, np.where(online > 1e-9, trained / online, np.nan)


def spans_of(present: Iterable[Row]) -> dict[str, list[Span]]:
    """By node: when it was there, in order."""
    found: dict[str, list[Span]] = {}
    for row in present:
        found.setdefault(row["node"], []).append((float(row["came"]), float(row["went"])))
    return {node: sorted(spans) for node, spans in found.items()}


def cut(span: Span, within: Sequence[Span]) -> list[Span]:
    """The parts of ``span`` that lie in one of ``within``."""
    begin, end = span
    return [(max(begin, a), min(end, b)) for a, b in within if min(end, b) > max(begin, a)]


def seconds_in(bins: F64, spans: Sequence[Span]) -> F64:
    """(k,) how much of the spans lies in each of the bins, whose edges are (k + 1,)."""
    if not spans:
        return np.zeros(len(bins) - 1)
    begins, ends = np.sort(np.array(spans), axis=0).T  # the sum does not ask which belongs to which
    return np.diff(_past(bins, begins) - _past(bins, ends))


def _past(edges: F64, moments: F64) -> F64:
    """By each edge, the summed seconds since those of the sorted moments that lie before it."""
    count = np.searchsorted(moments, edges)
    total = np.concatenate([[0.0], np.cumsum(moments)])
    return np.asarray(count * edges - total[count], dtype=np.float64)


# A round, node by node ----------------------------------------------------------------------------


def typical(rounds: Sequence[Row]) -> Row | None:
    """The round whose length is in the middle; of several, the last."""
    order = sorted(rounds, key=lambda row: (row["published"] - row["opened"], row["round"]))
    return order[len(order) // 2] if order else None


def strips(row: Row, leases: Iterable[Row], present: Iterable[Row]) -> list[Strip]:
    """What some nodes did in a round: of each class, and of its liars, fastest to slowest."""
    of_node: dict[str, list[Row]] = {}
    for lease in leases:
        if lease["round"] == row["round"]:
            of_node.setdefault(lease["node"], []).append(lease)
    groups: dict[tuple[str, str], list[list[Row]]] = {}
    for mine in of_node.values():
        mine.sort(key=lambda lease: lease["sent"])
        groups.setdefault((mine[-1]["population"], mine[-1]["attack"]), []).append(mine)
    here = spans_of(present)
    found = []
    for group in sorted(groups):
        nodes = sorted(groups[group], key=lambda mine: (_done(mine[-1]), mine[-1]["node"]))
        for place, index in enumerate(some_of(range(len(nodes)), len(groups))):
            found.append(_strip(row, nodes[index], here, first=place == 0))
    return found


def _done(lease: Row) -> float:
    moment = lease["arrived"]
    return float("inf") if moment is None else float(moment)


def _strip(
    row: Row, mine: Sequence[Row], here: Mapping[str, Sequence[Span]], *, first: bool
) -> Strip:
    opened, published = row["opened"], row["published"]
    parts: list[tuple[float, float, str]] = []
    at = opened
    for lease in mine:
        begin = max(at, lease["sent"])
        parts.append((at, begin, "wait"))
        # A lease that was closed over a node's head ends when it hears of it.
        last = min(published, lease["answered"] if lease["answer"] == GIVEN_UP else published)
        for key, doing in (
            ("fetched", "fetch"),
            ("trained", "train"),
            ("encoded", "encode"),
            ("arrived", "push"),
        ):
            moment = lease.get(key)
            until = max(begin, last if moment is None else min(moment, last))
            parts.append((begin, until, doing))
            begin = until
        at = begin
    parts.append((at, published, "wait"))
    lease = mine[-1]
    span = (opened, published)
    away = gaps(span, here.get(lease["node"], [span]))
    kept = [
        (a - opened, b - opened, doing)
        for begin, end, doing in parts
        for a, b in gaps((begin, end), away)
    ]
    lie = f" ({lease['attack']})" if lease["attack"] else ""
    accepted = lease["answer"] == ACCEPTED
    return Strip(
        label=f"{lease['node']}{lie}",
        parts=(*kept, *((a - opened, b - opened, "away") for a, b in away)),
        counted=accepted,
        lies=bool(lie),
        note="" if accepted else str(lease["answer"]),
        first=first,
    )


def gaps(span: Span, within: Sequence[Span]) -> list[Span]:
    """The parts of ``span`` that lie in none of ``within``, which is in order."""
    found, at = [], span[0]
    for begin, end in within:
        if begin > at:
            found.append((at, min(begin, span[1])))
        at = max(at, end)
        if at >= span[1]:
            break
    if at < span[1]:
        found.append((at, span[1]))
    return [(a, b) for a, b in found if b > a]


# Liars --------------------------------------------------------------------------------------------

LIED: Final = ("leased", "accepted", "counted")
"""Of a round's tokens that liars were given, that were accepted of them, and their weight in the
sum: tokens times influence."""


def liars_shares(rounds: Sequence[Row], leases: Iterable[Row]) -> dict[str, list[float]]:
    """By one of ``LIED`` and round: the share of it all that is liars'."""
    places = {row["round"]: place for place, row in enumerate(rounds)}
    sums = {key: np.zeros((2, len(rounds))) for key in LIED}
    for lease in leases:
        place = places.get(lease["round"])
        if place is None:
            continue
        who, tokens = int(bool(lease["attack"])), lease["tokens"]
        sums["leased"][who, place] += tokens
        if lease["answer"] == ACCEPTED:
            influence = lease.get("influence")
            sums["accepted"][who, place] += tokens
            sums["counted"][who, place] += tokens * (1.0 if influence is None else influence)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            key: np.nan_to_num(lies / (honest + lies)).tolist()
            for key, (honest, lies) in sums.items()
        }


def shut_out(rounds: Sequence[Row], nodes: Iterable[Row], *, liars: bool) -> list[int]:
    """By round: how many liars (or honest nodes) are quarantined when it is published."""
    moments = sorted(
        node["quarantined"]
        for node in nodes
        if node.get("quarantined") is not None and bool(node["attack"]) is liars
    )
    ends = [row["published"] for row in rounds]
    return [int(n) for n in np.searchsorted(np.array(moments), np.array(ends), side="right")]
