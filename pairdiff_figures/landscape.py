"""A map of methods: what is done, and by which equations."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from pairdiff_figures.style import GREEN, GREY, LINES, WIDTH, closed_figure

LINE = 0.24  # inches: height of a line


def landscape_figure(works: Sequence[tuple[str, str, str, bool]]) -> Figure:
    """Methods in a table of equations (columns) and tasks (rows), both in the order of their first appearance.

    Args:
        works: equations, task, name, and whether it belongs to this book; those are green, others black.
    """
    columns, rows = (list(dict.fromkeys(work[part] for work in works)) for part in (0, 1))
    cells: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for column, row, name, own in works:
        cells.setdefault((row, column), []).append((name, own))
    heights = [max(len(cells.get((row, column), ())) for column in columns) + 1.7 for row in rows]
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, LINE * sum(heights) + 0.5))
    top = 0.0
    for row, height in zip(rows, heights, strict=True):
        ax.text(0.03, top + 0.7, row, ha="left", va="center", fontweight="bold", color=LINES)
        ax.axhline(top, color=GREY, linewidth=0.6)
        for column, name in enumerate(columns):
            for line, (text, own) in enumerate(cells.get((row, name), ())):
                style = {"color": GREEN, "fontweight": "bold"} if own else {"color": LINES}
                ax.text(column + 0.03, top + line + 1.8, text, ha="left", va="center", fontsize=9, **style)
        top += height
    ax.set(xlim=(0, len(columns)), ylim=(top, 0), yticks=[])
    ax.set_xticks([column + 0.03 for column in range(len(columns))], columns, ha="left", fontsize=9, fontweight="bold")
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    return figure
