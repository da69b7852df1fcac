"""Diagrams of networks: what each part does, and the shape of what comes out of it."""

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from pairdiff_figures.style import GREEN, LINES, PURPLE, WIDTH, closed_figure

POINTS = 13  # of all text: 8 on a phone, see WIDTH
LINE, HALVING, GAP = 0.235, 0.1, 0.22  # inches: of a line of text, of a halved resolution, and between boxes
WIDE, NARROW = 4.6, 1.95  # inches: boxes of a figure of one column, and of three


class Box(NamedTuple):
    """A box of the diagram, in inches from the left and from the top."""

    x: float  # of the middle
    y: float
    width: float
    height: float

    def side(self, across: float, down: float = 0.0) -> tuple[float, float]:
        """A point of the box; -1 is its left or upper edge, 1 its right or lower edge, 0 the middle."""
        return self.x + across * self.width / 2, self.y + down * self.height / 2


def architecture_figure(
    columns: Sequence[Sequence[tuple[str, Sequence[int]]]], skips: Sequence[tuple[int, int]] = ()
) -> Figure:
    """A network as boxes along a path; each halving of the resolution makes a box lower by the same step.

    Args:
        columns: what each box does, and the shape of what comes out, (channels, height, width) or (..., tokens,
            channels). The path runs down a single column; or down the first of three, through the only box of the
            second, which is below, and up the third.
        skips: connections beside the path, from one box to another, both counted along the path from 0.

    Raises:
        ValueError: if there are neither one nor three columns, or several boxes in the second of three.
    """
    path = [box for column in columns for box in column]
    if len(columns) == 1:
        places, width, between, middles = [(0, row) for row in range(len(path))], WIDE, ":  ", (WIDTH / 2,)
    else:
        down, [_], up = columns
        lowest = max(len(down), len(up))
        places = [(0, row) for row in range(len(down))] + [(1, lowest)] + [(2, row) for row in range(len(up))][::-1]
        width, between, middles = NARROW, "\n", (NARROW / 2, WIDTH / 2, WIDTH - NARROW / 2)
    labels = [f"{operation}{between}{' × '.join(map(str, shape))}" for operation, shape in path]
    smallest = min(shape[-2] for _, shape in path)
    heights = [
        LINE * (1 + label.count("\n")) + 0.1 + HALVING * log2(shape[-2] / smallest)
        for label, (_, shape) in zip(labels, path, strict=True)
    ]
    tops = [0.0]
    for row in range(1 + max(row for _, row in places)):
        tops.append(tops[-1] + GAP + max(h for h, (_, there) in zip(heights, places, strict=True) if there == row))
    boxes = [
        Box(middles[column], (tops[row] + tops[row + 1] - GAP) / 2, width, height)
        for (column, row), height in zip(places, heights, strict=True)
    ]
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, tops[-1] - GAP + 0.1))
    ax.set(xlim=(-0.03, WIDTH + 0.03), ylim=(tops[-1] - GAP + 0.03, -0.03))
    ax.set_axis_off()
    for box, label in zip(boxes, labels, strict=True):
        corner, round_ = box.side(-1, -1), "round,pad=0,rounding_size=0.06"
        colours = {"facecolor": (GREEN, 0.12), "edgecolor": GREEN}
        ax.add_patch(FancyBboxPatch(corner, box.width, box.height, round_, linewidth=1.2, **colours))
        ax.text(box.x, box.y, label, ha="center", va="center", fontsize=POINTS, color=LINES)
    for one, other in zip(boxes, boxes[1:], strict=False):
        _arrow(ax, _way(one, other), LINES)
    for start, end in skips:
        _arrow(ax, _way_beside(boxes[start], boxes[end]), PURPLE)
    return figure


def _way(one: Box, other: Box) -> list[tuple[float, float]]:
    """Corners of the line from a box to the next one of the path."""
    if one.x == other.x:
        downward = 1 if other.y > one.y else -1
        return [one.side(0, downward), other.side(0, -downward)]
    if other.y > one.y:  # into the lowest box, or out of it
        return [one.side(0, 1), (one.x, other.y), other.side(-1)]
    return [one.side(1), (other.x, one.y), other.side(0, 1)]


def _way_beside(one: Box, other: Box) -> list[tuple[float, float]]:
    """Corners of the line of a skip connection: around the boxes of its column, or across to another."""
    if one.x != other.x:
        return [one.side(1), other.side(-1)]
    start, end = one.side(1, 0.4), other.side(1, -0.4)
    beside = start[0] + 0.35
    return [start, (beside, start[1]), (beside, end[1]), end]


def _arrow(ax: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": colour, "linewidth": 1.4, "joinstyle": "miter"}
    ax.add_patch(FancyArrowPatch(path=Path(points), **style))
