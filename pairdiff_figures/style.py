"""What all figures share: colours, matplotlib's defaults, closed figures, legends, and images to scale."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet

# Okabe & Ito (2008): eight colours that people with any colour vision can distinguish
FIXED, MOVING = "#0072B2", "#E69F00"
GREEN, VERMILION, PURPLE, SKY, GREY = "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"
FOLDED = BLACK = "#000000"  # vermilion would be mistaken for moving's orange
WINE, OLIVE = "#882255", "#999933"  # of Tol's "muted" scheme
METHODS = ((GREY, "o"), (PURPLE, "s"), (GREEN, "D"), (VERMILION, "^"), (SKY, "v"), (BLACK, "P"))
FREE = (*METHODS, (WINE, "X"), (OLIVE, "<"))  # colour and marker of methods that are not NAMED
INSTANCE = " + instance"  # ends the name of a network's result after instance optimisation

# Colour, marker and line of what the book compares: each has the same ones in every figure.
NAMED = {
    "before": (GREY, "o", "-"),
    "before registration": (GREY, "o", "-"),
    "baseline": (PURPLE, "s", "-"),
    "one level only": (PURPLE, "<", ":"),
    "baseline + full size": (PURPLE, "X", "-."),
    "baseline, full size": (PURPLE, "X", "-."),
    "untrained": (OLIVE, "p", "-"),
    "best shift": (SKY, "v", "-"),
    "best affine map": (BLACK, "P", "-"),
    # networks, by their training pairs; "real" and "synthetic" are also sets of pairs
    "real": (GREEN, "D", "-"),
    "real, warped": (BLACK, "P", "-"),
    "real, motion": (SKY, "v", "-"),
    "synthetic": (VERMILION, "^", "-"),
    "synthetic, warped": (OLIVE, "<", "-"),
    "synthetic, motion": (WINE, "X", "-"),
    # sets of pairs
    "original": (GREEN, "D", "-"),
    "unseen": (GREEN, "D", "-"),
    "unseen people": (GREEN, "D", "-"),
    "reconstructed": (SKY, "v", "-"),
    "trained on": (BLACK, "P", "-"),
    "training people": (BLACK, "P", "-"),
    # samplers
    "tokens": (GREEN, "o", "-"),
    "DDIM": (PURPLE, "s", "-"),
    "rectified flow": (SKY, "v", "-"),
    "GAN": (WINE, "X", "-"),
    "student": (BLACK, "D", "-"),
    "student, Jensen-Shannon": (BLACK, "D", "-"),
    "student, reverse KL": (VERMILION, "^", "-"),
    "student, forward KL": (GREY, "P", "-"),
}
LINES = "#333333"
MASKED = "#B8B8B8"

# Mostly Tol's "muted" scheme; neighbouring structures stay distinct under simulated colour blindness. Left and
# right share one colour. The data sets' own tables have almost black colours, and similar ones for neighbours.
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

# Inches, at most: width of one image, and of a figure. A phone shows each figure 3.6 inches wide, so text in a wider
# one gets too small to read.
IMAGE, WIDTH = 2.4, 5.8
SCALE_BARS = (100, 50, 20, 10, 5, 2, 1)  # millimetres
# Positions of letters on an Axes: two in the upper corners, or four at the left, right, top and bottom edge
LETTERS_AT = {2: ((0.03, 0.98), (0.97, 0.98)), 4: ((0.02, 0.5), (0.98, 0.5), (0.5, 0.985), (0.5, 0.015))}


def use_style() -> None:
    """Set matplotlib's defaults to the book's style; call it once at the top of a notebook.

    If the environment variable PAIRDIFF_RETINA is set, a notebook stores its figures with twice the pixels at the same
    size, for screens of high density; players stay as they are.
    """
    shell = get_ipython()
    if os.environ.get("PAIRDIFF_RETINA") and shell is not None:
        shell.run_line_magic("config", "InlineBackend.figure_format = 'retina'")
    sizes = {"font.size": 11, "axes.titlesize": 11}
    sizes |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 10)
    lines = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    lines |= {"grid.color": "#DDDDDD", "lines.linewidth": 1.8, "legend.frameon": False}
    lines |= {"axes.prop_cycle": matplotlib.cycler(color=[GREEN, VERMILION, PURPLE, SKY, GREY, "#000000"])}
    images = {"image.cmap": "cividis", "image.interpolation": "nearest"}
    layout = {"figure.dpi": 110, "figure.constrained_layout.use": True}
    plt.rcParams.update(sizes | lines | images | layout)


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How ``ax.plot`` draws each method: "color", "marker", "linestyle" and so on, by name.

    Those of NAMED look the same in every figure; the others take the remaining styles in order. A name that ends with
    INSTANCE has the colour and marker of its network, but the marker is open and the line dashed.
    """
    networks = {name: name.removesuffix(INSTANCE) for name in names}
    taken = [NAMED[network][0] for network in networks.values() if network in NAMED]
    spare = cycle([style for style in FREE if style[0] not in taken] or FREE)
    known = {network: NAMED.get(network) or (*next(spare), "-") for network in dict.fromkeys(networks.values())}
    styles = {}
    for name, network in networks.items():
        colour, marker, line = known[network]
        styles[name] = {"color": colour, "marker": marker, "linestyle": line}
        if name != network:
            styles[name] |= {"linestyle": "--", "markerfacecolor": "white", "markeredgewidth": 1.5}
    return styles


def structure_of(label_name: str) -> str:
    """The structure that a label belongs to: its name without the side."""
    return label_name.removeprefix("Left-").removeprefix("Right-")


def structure_colours(pairs: PairSet) -> np.ndarray:
    """Colour of each label, float (C, 3), RGB 0 to 1; the background is white.

    A structure listed in STRUCTURES has that colour; any other has the data set's own, or the next one of a cycle.
    """
    spare, known = cycle(dict.fromkeys(STRUCTURES.values())), dict(STRUCTURES)
    colours = [to_rgb("white")]
    for label, name in enumerate(pairs.label_names[1:], start=1):
        if structure_of(name) not in STRUCTURES and pairs.label_colours is not None:
            colours.append(tuple(value / 255 for value in pairs.label_colours[label]))
            continue
        if structure_of(name) not in known:
            known[structure_of(name)] = next(spare)
        colours.append(to_rgb(known[structure_of(name)]))
    return np.array(colours)


def closed_figure(rows: int, columns: int, size: tuple[float, float], **gridspec: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches that pyplot has closed, and its Axes (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **gridspec)
    plt.close(figure)  # otherwise pyplot shows it a second time at the end of the cell
    return figure, axes


def legend_below(figure: Figure, columns: int, colours: Mapping[str, Any] | None = None) -> None:
    """Add a legend of named colours, or of what all Axes show, below everything; the figure gets higher."""
    if colours is None:
        shown = [pair for ax in figure.axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
        handles = list({label: handle for handle, label in reversed(shown)}.values())[::-1]
    else:
        edge = {"edgecolor": "#888888", "linewidth": 0.5}
        handles = [Patch(facecolor=colour, label=name, **edge) for name, colour in colours.items()]
    if handles:
        names = [handle.get_label() for handle in handles]
        columns = max(1, min(columns, len(handles)))
        while columns > 1 and _legend_width(names, columns) > figure.get_figwidth():
            columns -= 1
        figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns) + 0.15)
        style = {"ncols": columns, "handlelength": 1.2, "columnspacing": 1.2}
        figure.legend(handles=handles, loc="outside lower center", **style)


def _legend_width(names: Sequence[str], columns: int) -> float:
    """Width in inches of a legend of these names, which fill one column after the other."""
    size = FontProperties(size=plt.rcParams["legend.fontsize"]).get_size_in_points()
    widths = [TextPath((0, 0), name, size=size).get_extents().width / 72 for name in names]
    rows, longer = divmod(len(names), columns)
    ends = np.cumsum([rows + (column < longer) for column in range(columns)])[:-1]
    marks = columns * 0.5  # the marks, and the spaces around them
    return marks + sum(max(each, default=0.0) for each in map(list, np.split(np.array(widths), ends)))


def field_of_view(pairs: PairSet) -> tuple[float, ...]:
    """Size of the images in millimetres along each array axis."""
    return tuple(size * mm for size, mm in zip(pairs.spatial, pairs.spacing, strict=True))


def image_figure(
    columns: Sequence[float], rows: Sequence[float], gap: float = 0.35, width: float = WIDTH, image: float = IMAGE
) -> tuple[Figure, np.ndarray]:
    """A closed figure for images at one scale, and its Axes (rows, columns).

    The width of each column and the height of each row are in millimetres; the space between rows, and the largest
    width of the figure and of an image, are in inches.
    """
    scale = min(width / sum(columns), image / max(columns))
    size = (scale * sum(columns), scale * sum(rows) + gap * (len(rows) - 1) + 0.35)
    return closed_figure(len(rows), len(columns), size, width_ratios=columns)


def show_image(
    ax: Axes,
    picture: np.ndarray,
    spacing: Sequence[float],
    title: str = "",
    colour: str = GREY,
    letters: str = "",
    upward: bool = False,
    **style: Any,
) -> AxesImage:
    """Draw an image to scale in a coloured frame; voxel centres lie on integer coordinates.

    Args:
        picture: RGB, 0 to 1, (across, along, 3), or numbers (across, along) that ``style`` maps to colours.
        spacing: millimetres per voxel across and along.
        letters: anatomical directions, two or four, see LETTERS_AT; a scale bar comes with them.
        upward: whether the second axis runs upwards rather than downwards.
    """
    if picture.ndim - ("cmap" not in style) != 2:
        raise ValueError(f"this draws 2D images, not a grid of shape {picture.shape[:-1]}: take one slice of it")
    across, along = picture.shape[:2]
    image = ax.imshow(picture.swapaxes(0, 1), interpolation="nearest", **style)
    limits = (-0.5, along - 0.5) if upward else (along - 0.5, -0.5)
    ax.set(xlim=(-0.5, across - 0.5), ylim=limits, xticks=[], yticks=[], title=title, aspect=spacing[1] / spacing[0])
    ax.spines[:].set(visible=True, color=colour, linewidth=0.6 if colour == GREY else 2.5)
    if letters:
        ink, around = ("white", "black") if style.get("cmap") == "gray" else (LINES, "white")
        halo = [withStroke(linewidth=2.5, foreground=around)]  # keeps letters readable on any image
        text = {"transform": ax.transAxes, "color": ink, "path_effects": halo, "zorder": 4}
        for (x, y), letter in zip(LETTERS_AT[len(letters)], letters, strict=True):
            ha, va = ("left", "center", "right")[round(2 * x)], ("bottom", "center", "top")[round(2 * y)]
            ax.text(x, y, letter, ha=ha, va=va, fontweight="bold", **text)
        width = across * spacing[0]  # mm
        length = next((mm for mm in SCALE_BARS if mm <= 0.35 * width), 1)
        ax.text(0.04, 0.055, f"{length} mm", fontsize="small", va="bottom", **text)
        text["path_effects"] = [withStroke(linewidth=4.5, foreground=around)]
        ax.plot([0.04, 0.04 + length / width], [0.035, 0.035], lw=2.5, solid_capstyle="butt", **text)
    return image


def deformed_grid(ax: Axes, displacement: torch.Tensor, folded: torch.Tensor) -> None:
    """Draw a regular grid moved by a displacement (2, across, along) in voxels, and a black dot wherever it folded."""
    grid = (fields.identity_grid(displacement.shape[1:]) + displacement).numpy()
    step = max(1, round(max(folded.shape) / 32))  # about 32 lines along the longer side
    first = step // 2
    lines = [*grid[:, first::step].transpose(1, 2, 0), *grid[:, :, first::step].transpose(2, 1, 0)]  # (K, 2)
    ax.add_collection(LineCollection(lines, colors=FIXED, linewidths=0.7))
    if folded.any():
        ax.scatter(*grid[:, folded.numpy()], s=4, color=FOLDED, zorder=3, label="folded")
        ax.legend(loc="lower right", frameon=True, framealpha=1, handletextpad=0.1, borderpad=0.2)


def warped(pairs: PairSet, index: int, displacement: torch.Tensor) -> torch.Tensor:
    """The moving image of one pair, uint8 (*spatial), warped by its displacement (D, *spatial) in voxels."""
    return fields.warp_labels(pairs.moving[index, None], displacement.detach().cpu().float()[None])[0]
