"""The figures and animations of the book, in one style.

``show_...`` draws one picture on a given Axes; ``..._figure`` gives a finished Figure and ``..._animation`` a
player for the notebook, so that one line is enough there. Fixed is blue, moving is orange, everywhere. A 2D
slice is drawn with array axis 0 to the right and axis 1 downwards, in voxel coordinates (voxel centres on
integers), stretched by the spacing so that a millimetre is as long across as it is down.

Figures are already closed for pyplot: a notebook shows the one that a cell returns, once.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from IPython.display import HTML
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet

# Okabe & Ito (2008): eight colours that people with any colour vision can tell apart
FIXED, MOVING = "#0072B2", "#E69F00"
GREEN, VERMILION, PURPLE, SKY, GREY = "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"
METHODS = ((GREY, "o"), (PURPLE, "s"), (GREEN, "D"), (VERMILION, "^"), (SKY, "v"), ("#000000", "P"))
LINES = "#333333"
MASKED = "#B8B8B8"

# Mostly Tol's "muted" scheme; structures that touch stay apart under simulated colour blindness. Left and
# right share one colour. The data sets' own tables hold near-blacks and neighbours that look alike.
STRUCTURES = {
    "Cortex": "#CC6677",
    "Subcortical-Gray-Matter": "#44AA99",
    "White-Matter": "#DADADA",
    "CSF": "#332288",
    "Cerebral-Cortex": "#CC6677",
    "Cerebral-White-Matter": "#DADADA",
    "Lateral-Ventricle": "#332288",
    "3rd-Ventricle": "#6699CC",
    "Thalamus": "#117733",
    "Caudate": "#88CCEE",
    "Putamen": "#44AA99",
    "Pallidum": "#DDCC77",
    "Hippocampus": "#882255",
    "Amygdala": "#AA4499",
    "VentralDC": "#F4A582",
    "Brain-Stem": "#999933",
    "Cerebellum-Cortex": "#EAA9B4",
}
LOW_INDEX_SIDE = "L"  # of array axis 0 where no label name tells the side: data sets are loaded so

IMAGE, WIDTH = 2.8, 9.5  # inches: width of an image, if the figure does not get wider than that
FRAMES = 24  # at most, in an animation
FRAME_DPI = 80
FRAME_COLOURS = 128  # of a frame's palette: keeps players small


def use_style() -> None:
    """Set matplotlib's defaults to the book's style; call it once at the top of a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.labelsize": 11,
            "legend.fontsize": 10,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "grid.color": "#DDDDDD",
            "axes.axisbelow": True,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "image.interpolation": "nearest",
            "axes.prop_cycle": cycler(color=[GREEN, VERMILION, PURPLE, SKY, GREY, "#000000"]),
        }
    )


# ---- structures: colours, names, sides


def structure_of(label_name: str) -> str:
    """The structure that a label belongs to: its name without the side."""
    return label_name.removeprefix("Left-").removeprefix("Right-")


def structure_colours(pairs: PairSet) -> np.ndarray:
    """Colour of each label, float (C, 3), RGB 0 to 1; the background is white.

    Names that the book knows have its colours; else the data's own table is used, else a cycle of colours.
    """
    spare = cycle([to_rgb(colour) for colour in STRUCTURES.values()])
    colours = [(1.0, 1.0, 1.0)]
    for label, name in enumerate(pairs.label_names[1:], start=1):
        if structure_of(name) in STRUCTURES:
            colours.append(to_rgb(STRUCTURES[structure_of(name)]))
        elif pairs.label_colours is not None:
            colours.append(tuple(value / 255 for value in pairs.label_colours[label]))
        else:
            colours.append(next(spare))
    return np.array(colours)


def _sides(image: np.ndarray, pairs: PairSet) -> tuple[str, str]:
    """The patient's side at the low and at the high end of array axis 0, read off the label names."""
    places = {}
    for side in ("Left-", "Right-"):
        labels = [label for label, name in enumerate(pairs.label_names) if name.startswith(side)]
        places[side] = np.nonzero(np.isin(image, labels))[0]
    if all(len(found) for found in places.values()):
        left_is_low = places["Left-"].mean() < places["Right-"].mean()
    else:
        left_is_low = LOW_INDEX_SIDE == "L"
    return ("L", "R") if left_is_low else ("R", "L")


# ---- one picture on an Axes


def show_labels(
    ax: Axes, image: torch.Tensor, pairs: PairSet, title: str = "", colour: str = GREY, marks: bool = False
) -> None:
    """Draw a label map.

    Args:
        image: uint8 (H, W), such as ``pairs.fixed[0]`` or a warped one.
        pairs: the set it belongs to, for names, colours and spacing.
        title: written above.
        colour: of the frame; FIXED and MOVING tell the two images apart.
        marks: with scale bar and the patient's sides. One image of a row is enough.
    """
    array = _slice(image)
    ax.imshow(structure_colours(pairs)[array].swapaxes(0, 1), aspect=_aspect(pairs), interpolation="nearest")
    _frame(ax, array.shape, title, colour)
    if marks:
        _marks(ax, array, pairs)


def show_overlap(
    ax: Axes, fixed: torch.Tensor, moving: torch.Tensor, pairs: PairSet, title: str = "", marks: bool = False
) -> None:
    """Draw the outlines of all structures of the fixed (blue) and the moving or warped image (orange).

    Args:
        fixed, moving: uint8 (H, W). Where the two agree on a structure the ground is grey.
    """
    a, b = _slice(fixed), _slice(moving)
    agreement = np.where((a == b) & (a > 0), 0.88, 1.0)
    ax.imshow(agreement.T, cmap="gray", vmin=0, vmax=1, aspect=_aspect(pairs), interpolation="nearest")
    _outlines(ax, a, FIXED)
    _outlines(ax, b, MOVING)
    _frame(ax, a.shape, title)
    if marks:
        _marks(ax, a, pairs)


def show_grid(ax: Axes, displacement: torch.Tensor, pairs: PairSet, title: str = "") -> None:
    """Draw a regular grid of the fixed image where the displacement takes it in the moving image: x + u(x).

    Args:
        displacement: float (2, H, W), voxels, fixed to moving. Where the map folds there is a dot.
    """
    _need_2d(displacement.shape[1:])
    u = displacement.detach().cpu()
    place = (fields.identity_grid(u.shape[1:]) + u).numpy()  # (2, H, W)
    step = max(1, round(max(place.shape[1:]) / 32))
    lines = [place[:, i].T for i in range(step // 2, place.shape[1], step)]
    lines += [place[:, :, i].T for i in range(step // 2, place.shape[2], step)]
    ax.add_collection(LineCollection(lines, colors=FIXED, linewidths=0.7))
    folded = fields.jacobian_determinant(u[None])[0].numpy() <= 0
    if folded.any():
        ax.scatter(*place[:, folded], s=4, color=VERMILION, zorder=3, label="folded")
        ax.legend(loc="lower right", frameon=True, framealpha=1, handletextpad=0.1, borderpad=0.2)
    ax.set_aspect(_aspect(pairs))
    _frame(ax, place.shape[1:], title)


def show_displacement(ax: Axes, displacement: torch.Tensor, pairs: PairSet, title: str = "") -> None:
    """Draw a displacement as arrows over its length in millimetres, with a colour bar.

    Args:
        displacement: float (2, H, W), voxels, fixed to moving; an arrow runs from x to x + u(x).
    """
    _need_2d(displacement.shape[1:])
    u = displacement.detach().cpu().numpy()
    length = np.sqrt(sum((mm * component) ** 2 for mm, component in zip(pairs.spacing, u, strict=True)))
    image = ax.imshow(length.T, cmap="cividis", vmin=0, aspect=_aspect(pairs), interpolation="nearest")
    step = max(1, round(max(length.shape) / 24))
    x, y = np.mgrid[step // 2 : length.shape[0] : step, step // 2 : length.shape[1] : step]
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008}
    ax.quiver(x, y, u[0, x, y], u[1, x, y], color="white", edgecolor="black", linewidth=0.4, **arrows)
    _frame(ax, length.shape, title)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="|u| in mm")


def show_tokens(ax: Axes, tokens: torch.Tensor, mask_token: int | None = None, title: str = "") -> None:
    """Draw a grid of tokens: a colour for each code, in no order as codes have none, and grey where masked.

    Args:
        tokens: integers (H, W).
        mask_token: the integer that stands for a masked token, if there is one.
    """
    array = _slice(tokens)
    ax.imshow(_token_colours(array, mask_token).swapaxes(0, 1), interpolation="nearest")
    ax.set(xticks=np.arange(array.shape[0] + 1) - 0.5, yticks=np.arange(array.shape[1] + 1) - 0.5)
    ax.grid(color="white", linewidth=1)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title)


def _token_colours(tokens: np.ndarray, mask_token: int | None) -> np.ndarray:
    """RGB (..., 3): three lightnesses, and hues by the golden ratio, which keeps successive codes apart."""
    hue = tokens * 0.6180339887 % 1.0
    saturation, value = np.array([1.0, 0.65, 0.4])[tokens % 3], np.array([0.8, 0.9, 0.95])[tokens % 3]
    colours = hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))
    return (
        colours
        if mask_token is None
        else np.where((tokens == mask_token)[..., None], to_rgb(MASKED), colours)
    )


def _slice(image: torch.Tensor) -> np.ndarray:
    _need_2d(image.shape)
    return image.detach().cpu().numpy()


def _need_2d(shape: Sequence[int]) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"only 2D slices can be drawn, not a grid of shape {tuple(shape)}: take one slice of it"
        )


def _aspect(pairs: PairSet) -> float:
    return pairs.spacing[1] / pairs.spacing[0]


def _frame(ax: Axes, shape: Sequence[int], title: str, colour: str = GREY) -> None:
    """The whole field of view with axis 1 downwards, no ticks, a frame in ``colour``."""
    ax.set(xlim=(-0.5, shape[0] - 0.5), ylim=(shape[1] - 0.5, -0.5), xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=colour, linewidth=0.6 if colour == GREY else 2.5)
    ax.set_title(title)


def _marks(ax: Axes, image: np.ndarray, pairs: PairSet) -> None:
    """The patient's sides in the upper corners and a scale bar in the lower left one."""
    low, high = _sides(image, pairs)
    for place, side in ((0.03, low), (0.97, high)):
        align = "left" if place < 0.5 else "right"
        ax.text(place, 0.98, side, transform=ax.transAxes, ha=align, va="top", color=LINES, fontweight="bold")
    width, height = image.shape
    nice = [100, 50, 20, 10, 5, 2, 1]  # millimetres
    length = next((mm for mm in nice if mm <= 0.35 * width * pairs.spacing[0]), nice[-1])
    left, bottom = 0.05 * width - 0.5, 0.95 * height - 0.5
    right = left + length / pairs.spacing[0]
    ax.plot([left, right], [bottom, bottom], color=LINES, linewidth=2.5, solid_capstyle="butt")
    ax.text(
        left, bottom - 0.015 * height, f"{length} mm", ha="left", va="bottom", color=LINES, fontsize="small"
    )


def _outlines(ax: Axes, image: np.ndarray, colour: str, linewidth: float = 0.9) -> None:
    for label in np.unique(image[image > 0]):
        # padded, so that a structure cut by the edge of the image is closed
        mask = np.pad(image == label, 1).astype(float)
        x, y = (np.arange(-1, size + 1) for size in image.shape)
        ax.contour(x, y, mask.T, levels=[0.5], colors=colour, linewidths=linewidth)


# ---- finished figures


def closed_figure(
    rows: int, columns: int, size: tuple[float, float], **gridspec: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches that pyplot has closed, and its Axes (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **gridspec)
    plt.close(figure)  # pyplot would show it a second time at the end of the cell
    return figure, axes


def _image_size(rows: int, columns: int, pairs: PairSet, title: float = 0.35) -> tuple[float, float]:
    """Width and height in inches of a figure of so many images; ``title`` is the space above each row but the first."""
    width = min(IMAGE, WIDTH / columns)
    high = pairs.spatial[1] * pairs.spacing[1] / (pairs.spatial[0] * pairs.spacing[0])
    return width * columns, (width * high + title) * rows + (0.35 - title)


def _structure_legend(figure: Figure, pairs: PairSet, labels: torch.Tensor) -> None:
    """The structures that occur in ``labels``, below the figure; left and right are one entry."""
    colours = structure_colours(pairs)
    present = {structure_of(pairs.label_names[c]): colours[c] for c in labels.unique().tolist() if c > 0}
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", linewidth=0.5, label=name.replace("-", " "))
        for name, colour in present.items()
    ]
    legend_below(figure, handles, columns=int(figure.get_figwidth() / 1.9))


def legend_below(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """A legend below everything, for which the figure grows."""
    if handles:
        columns = max(1, min(columns, len(handles)))
        figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns) + 0.15)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, handlelength=1.2, columnspacing=1.2
        )


def pair_figure(pairs: PairSet, index: int = 0) -> Figure:
    """One pair: the fixed image, the moving image, and their outlines over each other."""
    one = pairs[index]
    figure, axes = closed_figure(1, 3, _image_size(1, 3, pairs))
    show_labels(axes[0, 0], one.fixed[0], pairs, "fixed", FIXED, marks=True)
    show_labels(axes[0, 1], one.moving[0], pairs, "moving", MOVING)
    show_overlap(axes[0, 2], one.fixed[0], one.moving[0], pairs, "outlines of both")
    _structure_legend(figure, pairs, one.labels)
    return figure


def pairs_figure(sets: PairSet | Mapping[str, PairSet], number: int = 3) -> Figure:
    """The first pairs of one or several sets.

    Sets may be real and synthetic pairs, or pairs and their reconstructions.

    Args:
        sets: a PairSet, or several by the name that is written beside their row.
        number: how many pairs of each set; a pair is two neighbouring columns, fixed and moving.
    """
    named = {"": sets} if isinstance(sets, PairSet) else dict(sets)
    first = next(iter(named.values()))
    number = min(number, *(len(pairs) for pairs in named.values()))
    ratios = [1, 1, 0.06] * number  # a gap after each pair
    figure, axes = closed_figure(
        len(named), 3 * number, _image_size(len(named), 2 * number, first, title=0.1), width_ratios=ratios
    )
    for row, (name, pairs) in enumerate(named.items()):
        for index in range(number):
            fixed, moving, gap = axes[row, 3 * index : 3 * index + 3]
            titles = ("fixed", "moving") if row == 0 else ("", "")
            show_labels(fixed, pairs.fixed[index], pairs, titles[0], FIXED, marks=row == index == 0)
            show_labels(moving, pairs.moving[index], pairs, titles[1], MOVING)
            gap.set_visible(False)
        axes[row, 0].set_ylabel(name)
    _structure_legend(figure, first, torch.cat([pairs.labels[:number].flatten() for pairs in named.values()]))
    return figure


def registration_figure(pairs: PairSet, displacement: torch.Tensor, index: int = 0) -> Figure:
    """A registered pair: both images and the warped one, the outlines before and after, the deformed grid.

    Args:
        displacement: float (N, 2, H, W), voxels, fixed to moving, one for each pair of the set.
    """
    one, u = pairs[index], displacement[index].detach().cpu().float()
    warped = fields.warp_labels(one.moving, u[None])[0]
    figure, axes = closed_figure(2, 3, _image_size(2, 3, pairs))
    show_labels(axes[0, 0], one.fixed[0], pairs, "fixed", FIXED, marks=True)
    show_labels(axes[0, 1], one.moving[0], pairs, "moving", MOVING)
    show_labels(axes[0, 2], warped, pairs, "moving, warped", MOVING)
    show_overlap(axes[1, 0], one.fixed[0], one.moving[0], pairs, "outlines before")
    show_overlap(axes[1, 1], one.fixed[0], warped, pairs, "outlines after")
    show_grid(axes[1, 2], u, pairs, "fixed grid, taken to moving")
    _structure_legend(figure, pairs, one.labels)
    return figure


def training_curve(history: Sequence[Mapping[str, float]], title: str = "") -> Figure:
    """What was logged during training, one panel a quantity.

    Args:
        history: one mapping a logged step: "step" and named numbers, as ``training.fit`` gives it.
    """
    names = [name for name in history[0] if name != "step"]
    columns = {1: 1, 2: 2, 4: 2}.get(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure, axes = closed_figure(rows, columns, (max(4.5, 3.0 * columns), 2.3 * rows + 0.3))
    steps = [entry["step"] for entry in history]
    for ax, name in zip(axes.flat, names, strict=False):
        values = np.array([entry.get(name, np.nan) for entry in history])
        ax.plot(steps, values, color=GREEN)
        if (values > 0).all() and values.max() > 30 * values.min():
            ax.set_yscale("log")
        ax.set(title=name.replace("_", " "), xlabel="step")
        ax.grid(axis="y")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.suptitle(title)
    return figure


def dice_figure(table: Mapping[str, torch.Tensor], label_names: Sequence[str]) -> Figure:
    """Dice of each structure for several methods, and their mean.

    Args:
        table: method to Dice, float (C - 1,) or (N, C - 1), 0 to 1; NaN is left out of the means. A method
            keeps its colour and marker by its place: before, baseline, real, synthetic is the book's order.
        label_names: C names, the background's first. Left and right are averaged.
    """
    structures = list(dict.fromkeys(structure_of(name) for name in label_names[1:]))
    members = [[i for i, n in enumerate(label_names[1:]) if structure_of(n) == name] for name in structures]
    figure, axes = closed_figure(1, 1, (7.5, 0.3 * len(structures) + 1.1))
    ax = axes[0, 0]
    for (method, values), (colour, marker) in zip(table.items(), cycle(METHODS)):  # noqa: B905, one is endless
        dice = values.detach().cpu().double().reshape(-1, len(label_names) - 1)
        means = [dice.nanmean(1).nanmean(), *(dice[:, columns].nanmean() for columns in members)]
        ax.plot(means, range(len(means)), marker, color=colour, label=method, clip_on=False, zorder=3)
    ax.set(xlabel="Dice", xlim=(0, 1), ylim=(len(structures) + 0.5, -0.5))
    names = ["all structures", *(name.replace("-", " ") for name in structures)]
    ax.set_yticks(range(len(names)), names)
    ax.get_yticklabels()[0].set_fontweight("bold")
    ax.axhline(0.5, color=GREY, linewidth=0.8)
    ax.grid()
    ax.tick_params(length=0, pad=8)
    ax.spines[:].set_visible(False)
    legend_below(figure, ax.get_legend_handles_labels()[0], columns=len(table))
    return figure


def area_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Sizes of the structures in real and in synthetic images: mean and standard deviation over the images.

    Both in percent of the real images' mean, as structures differ in size by a factor of a hundred.

    Args:
        rows: the table of ``metrics.compare_areas``; a structure that no real image has is left empty.
    """
    figure, axes = closed_figure(1, 1, (7.5, 0.28 * len(rows) + 0.9))
    ax = axes[0, 0]
    whole = np.array([row["real_mean"] or np.nan for row in rows]) / 100
    for kind, (colour, marker), shift in (("real", METHODS[2], -0.15), ("synthetic", METHODS[3], 0.15)):
        mean, sd = (np.array([row[f"{kind}_{what}"] for row in rows]) / whole for what in ("mean", "sd"))
        place = np.arange(len(rows)) + shift
        ax.errorbar(mean, place, xerr=sd, fmt=marker, color=colour, label=kind, markersize=5, elinewidth=1.5)
    ax.set(
        xlabel="size in % of the real mean, and standard deviation",
        xlim=(0, None),
        ylim=(len(rows) - 0.4, -0.6),
    )
    ax.set_yticks(range(len(rows)), [str(row["structure"]).replace("-", " ") for row in rows])
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)
    legend_below(figure, ax.get_legend_handles_labels()[0], columns=2)
    return figure


def codebook_figure(counts: torch.Tensor) -> Figure:
    """How often each code is used, from the most to the least frequent.

    Args:
        counts: integers (K,), as in ``metrics.codebook_use(...).counts``.
    """
    share = 100 * counts.sort(descending=True).values.double().cpu().numpy() / max(1, int(counts.sum()))
    used = int((counts > 0).sum())
    figure, axes = closed_figure(1, 1, (7.5, 2.8))
    ax = axes[0, 0]
    ax.fill_between(np.arange(len(share)) + 0.5, share, step="mid", color=GREEN)
    ax.axhline(
        100 / len(share), color=LINES, linewidth=1, linestyle="--", label="if all were equally frequent"
    )
    ax.set(xlim=(0, len(share)), ylim=(0, None), xlabel="code, by frequency", ylabel="% of the tokens")
    ax.set_title(f"{used} of {len(share)} codes in use")
    ax.legend()
    return figure


def memorisation_figure(
    distances: torch.Tensor, held_out_distances: torch.Tensor, threshold: float
) -> Figure:
    """Distances to the nearest training pair, of synthetic samples and of held-out real pairs.

    Args:
        distances, held_out_distances, threshold: fields of ``metrics.memorisation_audit(...)``, 0 to 1.
    """
    figure, axes = closed_figure(1, 1, (7.5, 3.0))
    ax = axes[0, 0]
    both = torch.cat([distances, held_out_distances]).cpu()
    bins = np.linspace(0, max(0.1, 1.02 * float(both.max())), 50)
    for values, (colour, _), name in (
        (held_out_distances, METHODS[2], "held-out real pairs"),
        (distances, METHODS[3], "synthetic pairs"),
    ):
        weights = np.full(len(values), 100 / len(values))
        ax.hist(values.cpu().numpy(), bins, weights=weights, color=colour, alpha=0.6, label=name)
    ax.axvline(
        threshold, color=LINES, linestyle="--", linewidth=1.2, label="5 % of the held-out pairs are nearer"
    )
    ax.set(xlim=(0, None), xlabel="voxels that differ from the nearest training pair (share)")
    ax.set_ylabel("% of the pairs")
    ax.legend(loc="upper left")
    return figure


# ---- animations


def unmasking_animation(
    states: torch.Tensor, mask_token: int, grid: tuple[int, int], pairs: PairSet | None = None
) -> HTML:
    """A player that shows how an all-masked grid of tokens is revealed.

    Args:
        states: integers (S, L), one sequence after each of S steps; at most 24, evenly chosen, are shown.
        mask_token: the integer that stands for a masked token.
        grid: (H, W) with L = H * W, the order of the tokens.
        pairs: the pair that the last state decodes to; if given, its images are uncovered with their tokens.
    """
    chosen = torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().long()
    shown = states[chosen].cpu().reshape(-1, *grid)  # (S, L) -> (frames, H, W)
    if pairs is None:
        size, aspect = (IMAGE, IMAGE * grid[1] / grid[0] + 0.35), 1.0
    else:  # the tokens fill the same field of view as the images
        size = _image_size(1, 3, pairs)
        aspect = _aspect(pairs) * pairs.spatial[1] / grid[1] / (pairs.spatial[0] / grid[0])
    figure, axes = closed_figure(1, 1 if pairs is None else 3, size)
    covers = []
    if pairs is not None:
        for ax, image, title, colour in (
            (axes[0, 1], pairs.fixed[0], "fixed", FIXED),
            (axes[0, 2], pairs.moving[0], "moving", MOVING),
        ):
            show_labels(ax, image, pairs, title, colour, marks=ax is axes[0, 1])
            cover = np.full(
                (*grid[::-1], 3), to_rgb(MASKED)
            )  # one pixel a token, over the whole field of view
            extent = (-0.5, pairs.spatial[0] - 0.5, pairs.spatial[1] - 0.5, -0.5)
            covers.append(ax.imshow(cover, extent=extent, aspect=_aspect(pairs), zorder=1.5))

    def draw(frame: int) -> None:
        masked = (shown[frame] == mask_token).numpy()
        axes[0, 0].clear()
        share = f"step {int(chosen[frame])}: {masked.mean():.0%} masked"
        show_tokens(axes[0, 0], shown[frame], mask_token, share)
        axes[0, 0].set_aspect(aspect)
        for cover in covers:
            cover.set_alpha(masked.T.astype(float))

    return player(figure, draw, len(shown), "Tokens are revealed one after the other until none is masked.")


def warp_animation(pairs: PairSet, displacement: torch.Tensor, index: int = 0) -> HTML:
    """A player that warps the moving image onto the fixed one: it follows t * u as t goes from 0 to 1.

    Args:
        displacement: float (N, 2, H, W), voxels, fixed to moving, one for each pair of the set.
    """
    one, u = pairs[index], displacement[index].detach().cpu().float()
    times = np.linspace(0, 1, 11)
    figure, axes = closed_figure(1, 2, _image_size(1, 2, pairs))
    outlines = [
        Line2D([], [], color=FIXED, label="fixed"),
        Line2D([], [], color=MOVING, label="moving, warped"),
    ]
    legend_below(figure, outlines, columns=2)

    def draw(frame: int) -> None:
        t = float(times[frame])
        for ax in axes.flat:
            ax.clear()
        warped = fields.warp_labels(one.moving, t * u[None])[0]
        show_labels(axes[0, 0], warped, pairs, f"moving, warped: t = {t:.1f}", MOVING, marks=True)
        show_overlap(axes[0, 1], one.fixed[0], warped, pairs, "outlines")

    return player(figure, draw, len(times), "The moving image is warped onto the fixed one.", mode="reflect")


SYMBOLS = {
    "fa-minus": "&minus;",
    "fa-fast-backward": "|&#9664;",
    "fa-step-backward": "&lsaquo;",
    "fa-play fa-flip-horizontal": "&#9664;",
    "fa-pause": "||",
    "fa-play": "&#9654;",
    "fa-step-forward": "&rsaquo;",
    "fa-fast-forward": "&#9654;|",
    "fa-plus": "+",
}


def player(figure: Figure, draw: Callable[[int], None], frames: int, alt: str, mode: str = "once") -> HTML:
    """The frames as a JavaScript player that needs nothing from elsewhere: no icon font, a small palette."""
    animation = FuncAnimation(figure, lambda frame: draw(frame) or [], frames=frames, interval=250)
    with plt.rc_context({"savefig.dpi": FRAME_DPI}):
        page = animation.to_jshtml(default_mode=mode)
    page = re.sub(r"<link[^>]*>", "", page)
    for icon, symbol in SYMBOLS.items():
        page = page.replace(f'<i class="fa {icon}"></i>', symbol)
    page = page.replace('<img id="', f'<img style="max-width: 100%" alt="{alt}" id="')
    page = re.sub(r"data:image/png;base64,([^\"']+)", _with_palette, page)
    return HTML(page)


def _with_palette(match: re.Match[str]) -> str:
    """A PNG as a data address again, in few colours: a third of the size."""
    image = Image.open(io.BytesIO(base64.b64decode(match[1].replace("\\\n", "")))).convert("RGB")
    small = io.BytesIO()
    image.quantize(FRAME_COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
