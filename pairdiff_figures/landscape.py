"""A map of methods: what is done, and by which equations."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from pairdiff_figures.style import GREEN, GREY, LINES, closed_figure

WIDTH, LINE = 9.5, 0.24  # inches: of the table, and of one entry in a cell


def landscape_figure(works: Sequence[tuple[str, str, str, bool]]) -> Figure:
    """Methods in a table of tasks (columns) and equations (rows), both in the order of their first appearance.

    Args:
        works: equations, task, name, and whether it belongs to this book; those are green, others black.
    """
    rows, columns = (list(dict.fromkeys(work[part] for work in works)) for part in (0, 1))
    cells: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for row, column, name, own in works:
        cells.setdefault((row, column), []).append((name, own))
    heights = [max(len(cells.get((row, column), ())) for column in columns) + 0.6 for row in rows]
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, LINE * sum(heights) + 0.5))
    top = 0.0
    for row, height in zip(rows, heights, strict=True):
        ax.text(-0.05, top + height / 2, row, ha="right", va="center", fontweight="bold", color=LINES)
        ax.axhline(top, color=GREY, linewidth=0.6)
        for column, name in enumerate(columns):
            for line, (text, own) in enumerate(cells.get((row, name), ())):
                style = {"color": GREEN, "fontweight": "bold"} if own else {"color": LINES}
                ax.text(column + 0.05, top + line + 0.8, text, ha="left", va="center", fontsize=10, **style)
        top += height
    for column in range(1, len(columns)):
        ax.axvline(column, color=GREY, linewidth=0.4)
    ax.set(xlim=(0, len(columns)), ylim=(top, 0), yticks=[])
    ax.set_xticks([column + 0.5 for column in range(len(columns))], columns, fontweight="bold")
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    return figure
