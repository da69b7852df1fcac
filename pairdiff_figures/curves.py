"""Figures of measured numbers: training curves, overlaps, sizes, codes, distances and landmark errors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pairdiff_figures.style import GREEN, GREY, LINES, WIDTH, closed_figure, legend_below, method_styles, structure_of


def training_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """What was logged during training, as ``training.fit`` returns it: "step" and named numbers, one panel each."""
    names = [name for name in history[0] if name != "step"]
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = closed_figure(rows, columns, (WIDTH if columns == 2 else 4.5, 1.8 * rows + 0.4))
    steps = [entry["step"] for entry in history]
    for number, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
        values = np.array([entry.get(name, np.nan) for entry in history])
        ax.plot(steps, values, color=GREEN)
        if (values > 0).all() and values.max() > 30 * values.min():
            ax.set_yscale("log")
        lowest = number + columns >= len(names)  # in its column: the others have the same steps
        ax.set(title=name.replace("_", " "), xlabel="step" if lowest else "")
        ax.tick_params(labelbottom=lowest)
        ax.grid(axis="y")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    return figure


def dice_figure(table: Mapping[str, torch.Tensor], label_names: Sequence[str]) -> Figure:
    """Dice of each structure for several methods, and their mean.

    Methods are drawn a little above one another, so that equal values do not hide each other.

    Args:
        table: maps each method to its Dice, float (C - 1,) or (N, C - 1), 0 to 1; means leave out NaN. For colours and
            markers see ``style.method_styles``.
        label_names: C names, the background's first. Left and right are averaged.

    The axis runs from the tenth below the lowest value to the tenth above the highest.
    """
    members: dict[str, list[int]] = {}
    for label, name in enumerate(label_names[1:]):
        members.setdefault(structure_of(name), []).append(label)
    between = 0.7 / max(4, len(table) - 1)  # of two methods, in rows
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, (0.2 + 0.07 * len(table)) * len(members) + 1.2))
    styles, shown = method_styles(table), []
    for number, (method, values) in enumerate(table.items()):
        dice = values.detach().cpu().double().reshape(-1, len(label_names) - 1)
        means = [dice.nanmean(1).nanmean(), *(dice[:, labels].nanmean() for labels in members.values())]
        rows = np.arange(len(means)) + between * (number - (len(table) - 1) / 2)
        style = styles[method] | {"linestyle": "none"}
        ax.plot(means, rows, **style, label=method, markersize=5, clip_on=False, zorder=3)
        shown += [float(mean) for mean in means if not mean.isnan()]
    low = math.floor(10 * min(shown, default=0)) / 10
    high = max(math.ceil(10 * max(shown, default=1)) / 10, low + 0.1)
    ax.set(xlabel="Dice", xlim=(low, high), ylim=(len(members) + 0.5, -0.5))
    ax.set_yticks(range(len(members) + 1), ["all structures", *(name.replace("-", " ") for name in members)])
    ax.get_yticklabels()[0].set_fontweight("bold")
    ax.axhline(0.5, color=GREY, linewidth=0.8)
    ax.grid()
    ax.tick_params(length=0, pad=8)
    ax.spines[:].set_visible(False)
    legend_below(figure, columns=len(table))
    return figure


def area_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean and standard deviation of the sizes of structures in real and synthetic images, in percent of the real mean.

    ``rows`` is the table of ``metrics.compare_areas``; a structure that no real image has is left empty.
    """
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, 0.28 * len(rows) + 0.9))
    percent = np.array([row["real_mean"] or np.nan for row in rows]) / 100
    styles = method_styles(("real", "synthetic"))
    for kind, shift in (("real", -0.15), ("synthetic", 0.15)):
        mean, sd = (np.array([row[f"{kind}_{what}"] for row in rows]) / percent for what in ("mean", "sd"))
        rows_at = np.arange(len(rows)) + shift
        style = styles[kind] | {"linestyle": "none"}
        ax.errorbar(mean, rows_at, xerr=sd, **style, label=kind, markersize=5, elinewidth=1.5)
    ax.set(xlabel="size in % of the real mean, and standard deviation", xlim=(0, None))
    ax.set_yticks(range(len(rows)), [str(row["structure"]).replace("-", " ") for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    legend_below(figure, columns=2)
    return figure


def codebook_figure(counts: torch.Tensor) -> Figure:
    """How often each code is used, most frequent first, on a logarithmic axis.

    ``counts`` are integers (K,), as in ``metrics.codebook_use(...).counts``.
    """
    share = 100 * counts.sort(descending=True).values.double().cpu().numpy() / max(1, int(counts.sum()))
    used = share[share > 0]
    lowest = used.min(initial=100 / len(share)) / 2
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, 2.8))
    ax.stairs(used, baseline=lowest, fill=True, color=GREEN)
    ax.axhline(100 / len(share), color=LINES, linewidth=1, linestyle="--", label="if all were equally frequent")
    ax.set(xlim=(0, len(share)), xlabel="code, by frequency", ylabel="% of the tokens")
    ax.set(yscale="log", ylim=(lowest, None))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title(f"{len(used)} of {len(share)} codes in use")
    ax.legend()
    return figure


def memorisation_figure(distances: torch.Tensor, held_out_distances: torch.Tensor, threshold: float) -> Figure:
    """Distances to the nearest training pair, 0 to 1, of a ``metrics.memorisation_audit(...)``, and its threshold."""
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, 3.0))
    named = {"held-out real pairs": held_out_distances.cpu(), "synthetic pairs": distances.cpu()}
    bins = np.linspace(0, max(0.1, 1.02 * float(torch.cat(list(named.values())).max())), 50)
    styles = method_styles(("real", "synthetic")).values()
    for (name, values), style in zip(named.items(), styles, strict=True):
        weights = np.full(len(values), 100 / len(values))
        ax.hist(values.numpy(), bins, weights=weights, color=style["color"], alpha=0.6, label=name)
    ax.axvline(threshold, color=LINES, ls="--", linewidth=1.2, label="5 % of the held-out pairs are nearer")
    ax.set(xlim=(0, None), xlabel="share of voxels that differ from the nearest training pair", ylabel="% of the pairs")
    legend_below(figure, columns=3)
    return figure


def error_curves_figure(errors: Mapping[str, torch.Tensor], labels: Mapping[str, str] | None = None) -> Figure:
    """Cumulative landmark errors: for each method, the share of landmarks that are at most x mm off.

    ``errors`` maps each method to its target registration errors, float (K,), mm; K may differ. For colours and markers
    see ``style.method_styles``. The marker is the median. The axis shows 99 % of the landmarks of each method.
    ``labels`` has what the legend calls a method, if it is not its name.
    """
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, 3.6))
    end = 1e-6
    styles = method_styles(errors)
    for method, values in errors.items():
        mm = values.double().numpy(force=True)
        median, end, name = np.median(mm), max(end, np.quantile(mm, 0.99)), (labels or {}).get(method, method)
        ax.ecdf(mm, color=styles[method]["color"], linestyle=styles[method]["linestyle"])
        ax.plot(median, 0.5, **styles[method], ms=8, label=f"{name}: median {median:.1f} mm", zorder=3)
    ax.axhline(0.5, color=LINES, linewidth=0.8, linestyle="--", zorder=0)
    ax.set(xlim=(0, end), ylim=(0, 1), xlabel="target registration error, mm", ylabel="% of the landmarks within")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    ax.grid()
    legend_below(figure, columns=2)
    return figure


def mean_interval(values: torch.Tensor, count: int | None = None) -> list[float]:
    """A bootstrap's 95 % interval of the mean of float (N,): both ends.

    It draws ``count`` of the values (as many as there are) with replacement, 10,000 times, from seed 0.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (10_000, count or len(values)), generator=generator)
    means = values.double().cpu()[drawn].mean(1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def cases_figure(
    rows: Mapping[str, torch.Tensor],
    xlabel: str = "target registration error, mm",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Every case of each method as a dot, and below the dots their mean (diamond) with its :func:`mean_interval`.

    Args:
        rows: by method, one value per case, float (N,); N may differ. For colours see ``style.method_styles``.
        xlabel: what the values are, and their unit.
        labels: what stands beside a row, if it is not the method's name.

    The axis starts at 0 if the lowest value is below a quarter of the highest, and else where the data are.
    """
    figure, [[ax]] = closed_figure(1, 1, (WIDTH, 0.43 * len(rows) + 0.7))
    for height, (method, style) in enumerate(method_styles(rows).items()):
        values, colour = rows[method].double().cpu(), style["color"]
        dots = style | {"marker": "o", "markersize": 4, "linestyle": "none", "alpha": 0.5, "markeredgewidth": 1}
        ax.plot(values, [height - 0.12] * len(values), **dots)
        ax.plot(mean_interval(values), [height + 0.2] * 2, color=colour)
        ax.plot(values.mean(), height + 0.2, **style | {"marker": "D", "markersize": 5})
    ax.set_yticks(range(len(rows)), [(labels or {}).get(method, method) for method in rows])
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    every = torch.cat([values.double().cpu() for values in rows.values()])
    if 0 <= every.min() < every.max() / 4:
        ax.set_xlim(0, None)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    return figure


def steps_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], references: Mapping[str, tuple[str, float]] | None = None
) -> Figure:
    """What sampling in few steps costs: one panel per measure, one line per method.

    Args:
        panels: by measure, then by method, the value at each number of steps. For colours and markers see
            ``style.method_styles``; all panels have the same ones.
        references: by measure, the name and value of a dashed line.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = closed_figure(rows, columns, (3.3 * columns, 2.6 * rows))
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    seen: set[int] = set()
    styles = method_styles(dict.fromkeys(method for methods in panels.values() for method in methods))
    for ax, (measure, methods) in zip(axes.flat, panels.items(), strict=False):
        for method, values in methods.items():
            seen |= set(values)
            ax.plot(list(values), list(values.values()), **styles[method], label=method, clip_on=False)
        if references and measure in references:
            name, value = references[measure]
            ax.axhline(value, color=LINES, linewidth=1, linestyle="--", label=name)
        ax.set(xscale="log", xlabel="steps", ylabel=measure, ylim=(0, None))
        ax.set_xticks(sorted(seen), map(str, sorted(seen)))
        ax.minorticks_off()
        ax.grid()
    legend_below(figure, columns=4)
    return figure
