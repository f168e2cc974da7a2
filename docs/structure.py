"""Read which file imports which, and place the boxes that docs/draw_structure.py draws."""

import ast
import random
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from imports import FREE, find_imports, find_modules

TRIES, TURNS = 24, 60
Edges = dict[tuple[str, str], int]  # from, to: how many imports


class Piece(NamedTuple):
    """A piece of an arrow, from one row to the next.

    Its ends are boxes or stops, `(arrow, row)`. Arrows down to one box are one arrow.
    """

    arrow: tuple[str, str, bool]  # from (if it runs up), to, whether it is part of a circle
    upper: Any
    lower: Any


def read(root: Path) -> tuple[list[str], Edges]:
    """Return the files of the project at `root`, and 1 for each pair of which one imports other."""
    paths = {name: path for name, path in find_modules(root) if name.split(".")[0] not in FREE}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    pairs = {(a, i.name) for a, tree in trees.items() for i in find_imports(a, tree, paths)}
    return list(paths), {(a, b): 1 for a, b in sorted(pairs) if b in paths and a != b}


def find_circles(edges: Edges) -> list[frozenset[str]]:
    """Return the groups in which each one reaches each other."""
    reach = {n: {b for a, b in edges if a == n} for edge in edges for n in edge}
    for middle in reach:
        for found in reach.values():
            found |= reach[middle] if middle in found else set()
    groups = {frozenset(m for m in reach[n] if n in reach[m]) for n in reach}
    return sorted(groups - {frozenset()}, key=sorted)


def find_up(edges: Edges) -> frozenset[tuple[str, str]]:
    """Return the arrows that run up if each circle is put into the order with the fewest."""
    fan = Counter(a for a, _ in edges)  # of two such orders, what imports much is above

    def cost(up: frozenset[tuple[str, str]]) -> tuple[int, int]:
        return sum(edges[edge] for edge in up), -sum(fan[b] for _, b in up)

    @cache
    def best(group: frozenset[str]) -> frozenset[tuple[str, str]]:
        lowest = {n: frozenset((n, m) for m in group if (n, m) in edges) for n in sorted(group)}
        orders = (best(group - {n}) | up for n, up in lowest.items())
        return min(orders, key=cost, default=frozenset())

    return frozenset(edge for circle in find_circles(edges) for edge in best(circle))


class Layout:
    """Boxes in rows, by what they import; in each row, near to what they are joined with."""

    def __init__(
        self,
        sizes: dict[str, tuple[float, float]],
        edges: Edges,
        page: float,
        margin: float,
        gap: float,
    ) -> None:
        self.sizes, self.edges, self.up = sizes, edges, find_up(edges)
        self.circle_of = {n: circle for circle in find_circles(edges) for n in circle}
        self.row: dict[Any, int] = dict(self._find_rows())
        self.pieces: Counter[Piece] = Counter()
        for (a, b), count in edges.items():
            up = (a, b) in self.up
            arrow = (a if up else "", b, b in self.circle_of.get(a, ()))
            high, low = (b, a) if up else (a, b)
            stops = [(arrow, row) for row in range(self.row[high] - 1, self.row[low], -1)]
            self.row |= {stop: stop[1] for stop in stops}
            for upper, lower in pairwise([high, *stops, low]):
                self.pieces[Piece(arrow, upper, lower)] += count
        self.rows: list[list[Any]] = [[] for _ in range(max(self.row.values()) + 1)]
        for point, row in self.row.items():
            self.rows[row].append(point)
        x = min((self._place(random.Random(seed)) for seed in range(TRIES)), key=self._tangle)
        wide = {p: sizes[p][0] / 2 if p in sizes else 0 for p in x}
        left, right = min(x[p] - wide[p] for p in x), max(x[p] + wide[p] for p in x)
        stretch = min(1.6, (page - 2 * margin) / (right - left))
        self.x = {p: page / 2 + (x[p] - (left + right) / 2) * stretch for p in x}
        # Of each point, by side (-1: below), the y of its own edge and that of its row.
        self.y: dict[tuple[Any, int], tuple[float, float]] = {}
        y = margin
        for points in self.rows:
            half = max(sizes[p][1] for p in points if p in sizes) / 2
            for p in points:
                for side in (-1, 1):
                    own = side * sizes[p][1] / 2 if p in sizes else half
                    self.y[p, side] = (y + half + own, y + half + side * half)
            y += 2 * half + gap
        self.height = y - gap + 116

    def find_ports(self, widest: float) -> dict[tuple[Any, int, Any], float]:
        """Return the x of each arrow's end at a point: below, by its piece; above, by the arrow."""
        ports: dict[Any, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
        for piece in self.pieces:
            ports[piece.upper, -1][piece].append(self.x[piece.lower])
            ports[piece.lower, 1][piece.arrow].append(self.x[piece.upper])
        x = {}
        for (p, side), ends in ports.items():
            step = min(widest, (self.sizes[p][0] - 20) / len(ends)) if p in self.sizes else 0
            for i, end in enumerate(sorted(ends, key=lambda end: mean(ends[end]))):
                x[p, side, end] = self.x[p] + (i - (len(ends) - 1) / 2) * step
        return x

    def _find_rows(self) -> dict[str, int]:
        """Count from the bottom, the longest way. What imports a circle is above all of it."""
        rows = dict.fromkeys(self.sizes, 0)
        for _ in rows:
            for a, b in self.edges:
                above, below = (self.circle_of.get(n, frozenset([n])) for n in (a, b))
                if above != below:
                    lowest = max(rows[n] for n in below) + 1
                    rows |= {n: max(rows[n], lowest) for n in above}
                elif (a, b) not in self.up:
                    rows[a] = max(rows[a], rows[b] + 1)
        return rows

    def _place(self, chance: random.Random) -> dict[Any, float]:
        x = {point: chance.random() for point in self.row}
        near: dict[Any, list[Any]] = defaultdict(list)
        for _, upper, lower in self.pieces:
            near[upper].append(lower)
            near[lower].append(upper)
        for turn in range(TURNS):  # down and up by turns; the last ones keep the order
            last, step = turn > TURNS * 2 // 3, turn % 2 * 2 - 1
            for row in self.rows[::step]:
                wish = {}
                for p in row:
                    done = {q: (self.row[p] - self.row[q]) * step > 0 for q in near[p]}
                    weight = {q: 1 if last or done[q] else 0.1 for q in near[p]}
                    total = sum(x[q] * w for q, w in weight.items())
                    wish[p] = total / sum(weight.values()) if weight else x[p]
                x |= self._apart(sorted(row, key=(x if last else wish).__getitem__), wish)
        return x

    def _apart(self, row: list[Any], wish: dict[Any, float]) -> dict[Any, float]:
        """Give each its wish, as nearly as they can have them apart and in this order."""
        widths = [self.sizes[p][0] if p in self.sizes else 0 for p in row]
        starts = list(accumulate((18 + sum(two) / 2 for two in pairwise(widths)), initial=0.0))
        blocks: list[tuple[float, int]] = []  # neighbours as close as they may be: place, count
        for p, start in zip(row, starts, strict=True):
            blocks.append((wish[p] - start, 1))
            while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
                (a, m), (b, n) = blocks.pop(-2), blocks.pop()
                blocks.append(((a * m + b * n) / (m + n), m + n))
        places = [place for place, n in blocks for _ in range(n)]
        return {p: at + start for p, at, start in zip(row, places, starts, strict=True)}

    def _tangle(self, x: dict[Any, float]) -> float:
        lines = [(self.row[p.upper], x[p.upper], x[p.lower]) for p in self.pieces]
        pairs = ((a - c) * (b - d) for (r, a, b), (s, c, d) in combinations(lines, 2) if r == s)
        return 100 * sum(p < 0 for p in pairs) + sum(abs(a - b) for _, a, b in lines)
