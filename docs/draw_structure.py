"""Draw which file imports which in a checkout of any commit, and print the counts.

    python docs/draw_structure.py CHECKOUT OUT.png

Without folders, each file is a box. With folders, each folder is one, and so is each file beside
them that others import; the number at an arrow says how many imports it stands for.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Line
from matplotlib.textpath import TextPath
from PIL import Image
from structure import Edges, Layout, find_circles, find_up, read

WIDTH, MARGIN, FONT, LINE = 1600, 40, 18, 36  # pixels
RED, PALE, GREY = "#d62728", "#fdeaea", "#5b6570"
COLORS = ["#3b6ea8", "#2e8b72", "#8a63b0", "#b5811a", "#44546a"]
COLORS += ["#3a9ab8", "#6f8f1f", "#b0609c", "#7a5c44", "#1f3f8a"]
CURVE = [Line.MOVETO, Line.LINETO, *[Line.CURVE4] * 3, Line.LINETO]
LEGEND = (
    "An arrow runs from a file to one that it imports. Arrows to the same box join on their way."
)
REDS = "Red: a circle. Thick: back up."
NUMBERS = "Numbers: how many imports."


def find_rooms(files: list[str], imports: Edges) -> dict[str, list[str]]:
    """Return the files in each box."""
    if not any("." in name for name in files):
        return {name: [name] for name in files}
    rooms, imported = defaultdict(list), {b for _, b in imports}
    for name in files:
        beside = f"{name}.py" if name in imported else "scripts"
        rooms[f"{name.split('.')[0]}/" if "." in name else beside].append(name)
    return rooms


class Room:
    """A box: one file, or a title and lines of files."""

    def __init__(self, title: str, files: list[str]) -> None:
        self.title, self.files, self.alone = title, files, title.removesuffix(".py") in files
        self.width, self.height = 190 if title.endswith(".py") else width_of(title) + 30, 34
        if not self.alone:
            lines, self.width = max(1, round((len(files) / 4.2) ** 0.5)), 300
            while len(self.lay_out()) > lines:
                self.width += 10
            self.height = LINE * lines + 54

    def lay_out(self) -> list[list[tuple[str, float, int]]]:
        """Return lines of files, each with its middle and its width."""
        start = 14 - self.width / 2
        lines: list[list[tuple[str, float, int]]] = [[]]
        x = start
        for file in self.files:
            width = width_of(file.split(".")[-1]) + 18
            if x + width > -start:
                lines, x = [*lines, []], start
            lines[-1].append((file, x + width / 2, width))
            x += width + 10
        return lines

    def draw(self, x: float, y: float, color: str, inside: int, circular: set[str]) -> None:
        if self.alone:
            red = self.files[0] in circular
            box(
                x, y, self.width, self.height, fc=PALE if red else "white", ec=RED if red else color
            )
            text(x, y, self.title)
            return
        box(x, y, self.width, self.height, fc="#f3f6fa", ec=color)
        side, y = self.width / 2 - 16, y + self.height / 2 - 24
        text(x - side, y, self.title, 21, ha="left", color=color, weight="bold")
        count = f"{len(self.files)} files" + (f", {inside} arrows inside" if inside else "")
        text(x + side, y, count, 15, ha="right", color=GREY)
        for i, line in enumerate(self.lay_out()):
            for file, middle, width in line:
                edge = RED if file in circular else "#b8c4d2"
                box(x + middle, y - 39 - LINE * i, width, 28, fc="white", ec=edge, lw=1, zorder=5)
                text(x + middle, y - 39 - LINE * i, file.split(".")[-1])


def width_of(text: str) -> int:
    return round(TextPath((0, 0), text, size=FONT).get_extents().width)


def text(x: float, y: float, text: str, size: float = FONT, **how: Any) -> None:
    how = {"ha": "center", "va": "center_baseline", "zorder": 6, "size": size * 0.72, **how}
    plt.text(x, y, text, **how)


def box(x: float, y: float, width: float, height: float, **how: Any) -> None:
    how = {"boxstyle": "round,pad=0,rounding_size=8", "lw": 1.6, "zorder": 4, **how}
    plt.gca().add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **how))


def draw_arrows(layout: Layout, color: dict[str, str], numbers: bool) -> None:
    """Draw each arrow with a white seam, so that it is seen to pass over others."""
    x = layout.find_ports(42 if numbers else 12)
    order = sorted({p.arrow for p in layout.pieces}, key=lambda a: (a[0], a[2], a[1]))
    for piece, count in layout.pieces.items():
        (up, to, circular), upper, lower = piece
        x1, x2 = x[upper, -1, piece], x[lower, 1, piece.arrow]
        (start, y1), (end, y2) = layout.y[upper, -1], layout.y[lower, 1]
        middle = (y1 + y2) / 2
        points = [(x1, start), (x1, y1), (x1, middle), (x2, middle), (x2, y2), (x2, end)]
        width = 1.2 + 0.9 * count**0.5 if numbers else 3 if up else 1.2
        shade, z = RED if circular else color[to], 2 + order.index(piece.arrow) / len(order)
        for c, lw, above in (("white", width + 2.5, 0), (shade, width, 0.001)):
            how = {"fill": False, "lw": lw, "ec": c, "zorder": z + above}
            plt.gca().add_patch(PathPatch(Line(points, CURVE), **how))
        size = 5 + 1.4 * width
        if up and upper == to:
            plt.plot(x1, start - size / 2, "^", ms=size, color=shade, zorder=4)
        elif not up and lower == to:
            plt.plot(x2, end + size / 2, "v", ms=size, color=shade, zorder=4)
        if numbers and upper in color:
            ground = {"fc": "white", "ec": "none", "pad": 1}
            text(x1, start - 16, str(count), 16, color=shade, weight="bold", bbox=ground)


def draw(root: Path, out: Path) -> str:
    files, imports = read(root)
    rooms = {title: Room(title, names) for title, names in find_rooms(files, imports).items()}
    room_of = {name: title for title, room in rooms.items() for name in room.files}
    edges = Counter((room_of[a], room_of[b]) for a, b in imports)
    between = {(a, b): count for (a, b), count in edges.items() if a != b}
    numbers = len(rooms) < len(files)
    sizes = {title: (room.width, room.height) for title, room in rooms.items()}
    layout = Layout(sizes, between, WIDTH, MARGIN, 96 if numbers else 62)

    circles = find_circles(imports)
    circular = {name for circle in circles for name in circle}
    inner = {(a, b): 1 for a, b in imports if room_of[a] == room_of[b]}
    up = sum(between[edge] for edge in layout.up) + len(find_up(inner))
    caption = f"{len(files)} files, {len(imports)} arrows, {len(circles) or 'no'} circle"
    caption += "s" * (len(circles) > 1) + f" of {len(circular)} files" * (len(circles) > 0)
    caption += f", {up or 'no'} arrow{'s' * (up > 1)} back up"

    plt.figure(figsize=(WIDTH / 100, layout.height / 100), dpi=100)
    plt.axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, layout.height)).axis("off")
    text(MARGIN, layout.height - 36, caption, 26, ha="left", weight="bold")
    legend = [LEGEND, *[NUMBERS] * numbers, *[REDS] * (len(circles) > 0)]
    text(MARGIN, layout.height - 72, " ".join(legend), 18, ha="left", color=GREY)
    titles = sorted(rooms, key=lambda title: (-layout.row[title], layout.x[title]))
    color = {title: COLORS[i % len(COLORS)] for i, title in enumerate(titles)}
    draw_arrows(layout, color, numbers)
    for t, room in rooms.items():
        middle = (layout.y[t, 1][0] + layout.y[t, -1][0]) / 2
        room.draw(layout.x[t], middle, color[t], edges[t, t], circular)
    plt.savefig(out)
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)
    return caption


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]), Path(sys.argv[2])))
