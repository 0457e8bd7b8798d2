"""A step's time on any number of ranks, from what one rank was measured to do and from what a network is said to do.

    step = fixed + work + imbalance + jitter + all-reduce (bandwidth + latency) + division + data + checkpoint

Every term is arithmetic that can be done by hand; ASSUMPTIONS says what it leaves out. Seconds, bytes, edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Mode = Literal["weak", "strong"]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16000)

NEGLIGIBLE = 1e-3
"""Of a step: a term that costs less bends nothing."""

ASSUMPTIONS = (
    "work: a step of one rank takes fixed + per_edge x edges, fitted to measured steps of a single rank; ranks do not "
    "slow each other down (memory bandwidth and heat of a full node are not modelled: measure on a full node)",
    "imbalance: all wait for the rank with most edges; edges per rank from the run's own sampler on sizes drawn with "
    "replacement from the dataset",
    "all-reduce: not overlapped with the backward pass; ring 2(N-1) latency + 2(N-1)/N bytes/bandwidth, or tree "
    "2 ceil(log2 N) latency + 2 bytes/bandwidth, whichever is faster; ZeRO 1 and 2 move the same bytes in two halves; "
    "small sums (counts, losses) by tree",
    "network: one latency, one bandwidth between any two ranks, no congestion: of ranks that share a network card give "
    "each its share",
    "division: every rank divides each step over all ranks; seconds measured here by doing it, not overlapped with the "
    "step, whose interpreter (and on a CPU whose core) it shares",
    "data: read ahead in the background; with data.store=disk, unless staged, waits appear where all ranks together "
    "read more than the file system gives; the other stores read nothing after the start",
    "checkpoint: what was measured to hold the ranks up, as often as stated, the same at every size",
    "jitter: the slowest of N ranks with normally distributed step times, sigma sqrt(2 ln N); 0 leaves it out",
)


@dataclass(frozen=True)
class Network:
    """latency: seconds of a message between two ranks. bandwidth: bytes per second of one rank, each way."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What one rank does, as measured.

    fixed: seconds of a step whatever its size. per_edge: seconds. edges: of a structure, mean. gradient_bytes: summed
    over the ranks each step, in `messages` pieces. sums: small all-reduces of a step. data_wait: seconds of a step.
    structure_bytes: read for one structure from a file system that all ranks share. checkpoint: seconds for which one
    holds up the ranks.
    """

    fixed: float
    per_edge: float
    edges: float
    gradient_bytes: float
    messages: float = 1.0
    sums: float = 2.0
    data_wait: float = 0.0
    structure_bytes: float = 0.0
    checkpoint: float = 0.0


@dataclass(frozen=True)
class Conditions:
    """mode: weak keeps the structures of a rank, strong those of a step. structures: of a step of one rank.

    file_system: bytes per second for all ranks together; None: enough. checkpoint_minutes: between two. jitter:
    standard deviation of a rank's step time, as a share of it.
    """

    mode: Mode
    structures: float
    file_system: float | None = None
    checkpoint_minutes: float = 30.0
    jitter: float = 0.0


@dataclass(frozen=True)
class Point:
    """A step on `ranks` ranks: seconds of its terms, what each costs beyond an ideal machine, and what follows."""

    ranks: int
    terms: dict[str, float]
    losses: dict[str, float]
    algorithm: str
    seconds: float
    structures_per_second: float
    efficiency: float

    @property
    def bent_by(self) -> str | None:
        """The term that costs most; None where nothing is lost."""
        worst = max(self.losses, key=lambda name: self.losses[name])
        return worst if self.losses[worst] > NEGLIGIBLE * self.seconds else None


def all_reduce(size: float, messages: float, ranks: int, network: Network) -> tuple[str, float, float]:
    """The faster algorithm for `size` bytes in `messages` pieces over `ranks`: its name, seconds of latency, of
    bandwidth."""
    if ranks == 1:
        return "none", 0.0, 0.0
    through = size / network.bandwidth
    ring = (2 * (ranks - 1) * network.latency * messages, 2 * (ranks - 1) / ranks * through)
    tree = (2 * math.ceil(math.log2(ranks)) * network.latency * messages, 2 * through)
    return ("ring", *ring) if sum(ring) <= sum(tree) else ("tree", *tree)


def predict_step(
    work: Work, network: Network, conditions: Conditions, ranks: int, imbalance: float, division: float = 0.0
) -> Point:
    """The step on `ranks` ranks. imbalance: edges of the rank that has most over the mean, >= 1. division: seconds in
    which a rank divides the step over all of them."""
    alone = work.fixed + work.per_edge * work.edges * conditions.structures + work.data_wait
    share = 1.0 if conditions.mode == "weak" else 1.0 / ranks
    structures = conditions.structures * share
    mean = work.per_edge * work.edges * structures
    algorithm, latency, bandwidth = all_reduce(work.gradient_bytes, work.messages, ranks, network)
    if ranks > 1:
        latency += work.sums * 2 * math.ceil(math.log2(ranks)) * network.latency
    terms = {
        "work": mean,
        "fixed": work.fixed,
        "imbalance": mean * (imbalance - 1),
        "jitter": conditions.jitter * math.sqrt(2 * math.log(ranks)) * (mean + work.fixed),
        "bandwidth": bandwidth,
        "latency": latency,
        "division": division,
        "data": work.data_wait * share,
    }
    if conditions.file_system:
        reading = ranks * structures * work.structure_bytes / conditions.file_system
        terms["data"] = max(terms["data"], reading - (sum(terms.values()) - terms["data"]))
    terms["checkpoint"] = sum(terms.values()) * work.checkpoint / (60 * conditions.checkpoint_minutes)
    seconds = sum(terms.values())
    ideal = {"work": mean, "fixed": work.fixed * share, "data": work.data_wait * share}
    losses = {name: value - ideal.get(name, 0.0) for name, value in terms.items()}
    return Point(ranks, terms, losses, algorithm, seconds, ranks * structures / seconds, alone * share / seconds)


def predict_curve(
    work: Work,
    network: Network,
    conditions: Conditions,
    imbalance: Callable[[int], float],
    ranks: Sequence[int] = RANKS,
    division: Callable[[int], float] = lambda _: 0.0,
) -> list[Point]:
    """The step at each of `ranks`; imbalance, division: as functions of the number of ranks."""
    return [predict_step(work, network, conditions, n, imbalance(n), division(n)) for n in ranks]


def verdicts(points: Sequence[Point]) -> list[str]:
    """Which term bends the curve, and where: one sentence each."""
    said = []
    start = 0
    for i, point in enumerate(points):
        if i + 1 < len(points) and points[i + 1].bent_by == point.bent_by:
            continue
        if point.bent_by is not None:
            first = points[start]
            where = f"at {first.ranks:,}" if start == i else f"from {first.ranks:,} to {point.ranks:,}"
            lost = [f"{p.losses[point.bent_by] / p.seconds:.1%}" for p in (first, point)]
            share = lost[0] if lost[0] == lost[1] else f"{lost[0]} to {lost[1]}"
            said.append(f"{where} ranks {LONG[point.bent_by]} costs most: {share} of a step")
        start = i + 1
    for bound in (0.9, 0.8, 0.5):
        below = next((p for p in points if p.efficiency < bound), None)
        if below is not None and below.bent_by is not None:
            said.append(
                f"efficiency falls below {bound:.0%} at {below.ranks:,} ranks ({below.efficiency:.0%}), "
                f"bent by {LONG[below.bent_by]}"
            )
    if not any(p.efficiency < 0.9 for p in points):
        said.append(f"efficiency stays above 90% up to {points[-1].ranks:,} ranks ({points[-1].efficiency:.0%} there)")
    return said


LONG: Mapping[str, str] = {
    "work": "the work",
    "fixed": "the fixed cost of a step",
    "imbalance": "the imbalance of edges",
    "jitter": "the jitter of step times",
    "bandwidth": "the all-reduce (bandwidth)",
    "latency": "the all-reduce (latency)",
    "division": "dividing the step over the ranks",
    "data": "waiting for data",
    "checkpoint": "the checkpoint",
}
"""Terms in a sentence."""


def as_json(
    work: Work, network: Network, conditions: Conditions, points: Sequence[Point], imbalance: Callable[[int], float]
) -> dict[str, Any]:
    """Everything that went into a prediction, and what came out."""
    return {
        "work": asdict(work),
        "network": asdict(network),
        "conditions": asdict(conditions),
        "assumptions": list(ASSUMPTIONS),
        "points": [{**asdict(p), "imbalance": imbalance(p.ranks), "bent_by": p.bent_by} for p in points],
        "verdicts": verdicts(points),
    }
