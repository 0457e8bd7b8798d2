"""Numbers of any many steps, kept as few enough to be drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable

POINTS = 480
"""As many means at most stand for all steps: about one for each pixel of a chart."""


class Thinned:
    """Means of a number over equal stretches of steps: one step each, until there are too many, then two, four, ..."""

    def __init__(self) -> None:
        self._width = 1
        self._bins: list[list[float]] = []  # [place, values, sum of steps, sum of values]

    def add(self, step: float, value: float) -> None:
        """The value of a step that is no earlier than the last one; what is not finite is left out."""
        if not math.isfinite(value):
            return
        place = step // self._width
        if self._bins and self._bins[-1][0] == place:
            last = self._bins[-1]
            last[1] += 1
            last[2] += step
            last[3] += value
            return
        self._bins.append([place, 1, step, value])
        if len(self._bins) > POINTS:
            self._halve()

    def cut(self, step: float) -> None:
        """Forget `step` and what came after it, and what shares a mean with them."""
        while self._bins and self._bins[-1][0] >= step // self._width:
            self._bins.pop()

    @property
    def points(self) -> list[tuple[float, float]]:
        """Mean step and mean value of each stretch, in order."""
        return [(steps / count, values / count) for _, count, steps, values in self._bins]

    def _halve(self) -> None:
        self._width *= 2
        bins, self._bins = self._bins, []
        for place, count, steps, values in bins:
            if self._bins and self._bins[-1][0] == place // 2:
                last = self._bins[-1]
                self._bins[-1] = [place // 2, last[1] + count, last[2] + steps, last[3] + values]
            else:
                self._bins.append([place // 2, count, steps, values])


def thinned(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """`points`, in the order of x, as few enough to be drawn."""
    kept = Thinned()
    for x, y in points:
        kept.add(x, y)
    return kept.points
