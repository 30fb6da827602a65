"""A model of matrix products for shapes that no measured row covers.

A product's time is taken from the nearest one that was measured, times the ratio of two costs: of the
variant's (waves of tiles, their steps along k, their epilogues, the bytes of operands) and of the
library's (operations, bytes). The costs' weights are fitted to the measured rows as the launch table is
generated; csrc/cuda/cute/model.h does the same sums at a call. A variant is taken only where most of the
nearest measured shapes were its kind's, and where it is predicted to be faster by a margin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .registry import Kernel

#: l, m, n, k, as the contracts of products have them.
EXTENTS = ("l", "m", "n", "k")
Shape = tuple[int, int, int, int]
#: The fraction by which a variant must be predicted to be faster, on a GPU that was measured and on
#: another one of its architecture.
MARGIN, MARGIN_ELSEWHERE = 0.10, 0.20
#: Neighbours asked, how many of them must be won, and how far the nearest of those may be.
NEIGHBOURS, VOTES, REACH = 3, 2, 2.0
TERMS = 4


@dataclass(frozen=True)
class Point:
    """A measured shape. variant: the fastest, or "" where the library was not slower by 3%."""

    gpu: str
    kernel: str
    at: Shape
    variant: str
    us: float = 0.0
    library_us: float = 0.0


@dataclass(frozen=True)
class Tile:
    """Of a variant: its tile, the step along k, and the blocks of a cluster down and across."""

    m: int
    n: int
    k: int
    down: int
    across: int


def tile_of(variant: Any) -> Tile:
    return Tile(variant.tile_m, variant.tile_n, variant.tile_k, variant.down, variant.across)


def is_product(kernel: Kernel) -> bool:
    """Whether the model knows kernels of this kind."""
    names = tuple(e.name for e in kernel.contract(kernel.variants[0]).extents)
    return names[:4] == EXTENTS and hasattr(kernel.variants[0], "tile_m")


def terms(t: Tile, at: Shape, multiprocessors: int) -> list[float]:
    """Of a variant's cost: one launch, the steps and the epilogues of the busiest block, bytes."""
    batch, m, n, k = at
    down, across = t.m * t.down, t.n * t.across
    clusters = batch * (-(-m // down)) * (-(-n // across))
    waves = -(-clusters // max(1, multiprocessors // (t.down * t.across)))
    area = t.m * t.n
    steps = -(-k // t.k)
    traffic = 2.0 * batch * (m * k + n * k + m * n)
    return [1.0, waves * steps * area * t.k * 1e-6, waves * area * 1e-4, traffic * 1e-6]


def library_terms(at: Shape, multiprocessors: int) -> list[float]:
    """Of the library's cost: one launch, operations, bytes, results."""
    batch, m, n, k = at
    traffic = 2.0 * batch * (m * k + n * k + m * n)
    work = float(batch) * m * n * k / multiprocessors
    return [1.0, work * 1e-7, traffic * 1e-6, float(batch) * m * n * 1e-6]


def cost(weights: Sequence[float], of: Sequence[float]) -> float:
    return sum(w * t for w, t in zip(weights, of))


def fit(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """The weights, none negative, with the least squares of relative errors."""
    kept = list(range(TERMS))
    while kept:
        scaled = [[row[i] / t for i in kept] for row, t in zip(rows, times)]
        size = len(kept)
        normal = [
            [sum(r[i] * r[j] for r in scaled) for j in range(size)] + [sum(r[i] for r in scaled)]
            for i in range(size)
        ]
        found = _solved(normal)
        worst = min(range(size), key=lambda i: found[i])
        if found[worst] >= 0:
            weights = [0.0] * TERMS
            for i, value in zip(kept, found):
                weights[i] = value
            return weights
        kept.pop(worst)
    raise ValueError("the rows of a kernel give no cost")


def _solved(normal: list[list[float]]) -> list[float]:
    """By Gauss; a column that the others make up gets nothing."""
    size = len(normal)
    rows = [list(row) for row in normal]
    scale = max(abs(rows[i][i]) for i in range(size))
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-12 * scale:
            rows[i] = [float(j == i) for j in range(size)] + [0.0]
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i])]
    return [rows[i][size] / rows[i][i] for i in range(size)]


@dataclass(frozen=True)
class Model:
    """Of one kernel on one GPU: its points and the weights of both costs."""

    points: tuple[Point, ...]
    tiles: dict[str, Tile]
    weights: tuple[float, ...]
    library_weights: tuple[float, ...]
    multiprocessors: int

    @classmethod
    def of(cls, points: Iterable[Point], tiles: dict[str, Tile], multiprocessors: int) -> Model:
        points = tuple(points)
        won = [p for p in points if p.variant]
        weights = fit(
            [terms(tiles[p.variant], p.at, multiprocessors) for p in won], [p.us for p in won]
        )
        library = fit(
            [library_terms(p.at, multiprocessors) for p in won], [p.library_us for p in won]
        )
        return cls(points, tiles, tuple(weights), tuple(library), multiprocessors)

    def times(self, at: Shape, near: Point, multiprocessors: int) -> tuple[float, float]:
        """Of `near`'s variant and of the library at a shape, in microseconds."""
        tile = self.tiles[near.variant]
        own = cost(self.weights, terms(tile, at, multiprocessors))
        own /= cost(self.weights, terms(tile, near.at, self.multiprocessors))
        library = cost(self.library_weights, library_terms(at, multiprocessors))
        library /= cost(self.library_weights, library_terms(near.at, self.multiprocessors))
        return near.us * own, near.library_us * library

    def chosen(
        self, at: Shape, margin: float = MARGIN, multiprocessors: int | None = None
    ) -> tuple[str, float]:
        """The variant for a shape and by which fraction it is predicted to be faster; ("", 0.0) for the
        library's kernel."""
        here = multiprocessors or self.multiprocessors
        nearest = sorted(self.points, key=lambda p: distance(p.at, at))[:NEIGHBOURS]
        won = [p for p in nearest if p.variant]
        if len(won) < VOTES or any(
            max(a, b) > REACH * min(a, b) for a, b in zip(won[0].at, at)
        ) or won[0].at[0] != at[0]:  # fmt: skip
            return "", 0.0
        own, library = self.times(at, won[0], here)
        gain = library / own - 1
        return (won[0].variant, gain) if gain > margin else ("", 0.0)


def distance(a: Shape, b: Shape) -> float:
    """The product of the extents' ratios."""
    product = 1.0
    for x, y in zip(a, b):
        product *= x / y if x > y else y / x
    return product


@dataclass(frozen=True)
class Validation:
    """A model without each of its points in turn, asked for that point. errors: relative, of the
    variant's time and of the library's, where both are known. wins: points where a variant won;
    chosen: where the model takes one; right: of those, where one won."""

    kernel: str
    own_errors: tuple[float, ...]
    library_errors: tuple[float, ...]
    points: int
    wins: int
    chosen: int
    right: int


def validate(kernel: str, model: Model, margin: float = MARGIN) -> Validation:
    """Leaves one out."""
    own_errors, library_errors, chosen, right = [], [], 0, 0
    for p in model.points:
        rest = [q for q in model.points if q is not p]
        without = Model.of(rest, model.tiles, model.multiprocessors)
        variant, _ = without.chosen(p.at, margin)
        chosen += bool(variant)
        right += bool(variant and p.variant)
        if p.variant:
            near = min((q for q in rest if q.variant), key=lambda q: distance(q.at, p.at))
            own, library = without.times(p.at, near, model.multiprocessors)
            # The time of the variant that was taken there, for the one that is near.
            tile = model.tiles[near.variant]
            same = cost(without.weights, terms(model.tiles[p.variant], p.at, model.multiprocessors))
            same /= cost(without.weights, terms(tile, p.at, model.multiprocessors))
            own_errors.append(own * same / p.us - 1)
            library_errors.append(library / p.library_us - 1)
    wins = sum(bool(p.variant) for p in model.points)
    return Validation(
        kernel, tuple(own_errors), tuple(library_errors), len(model.points), wins, chosen, right
    )
