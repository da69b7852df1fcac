"""The style of all figures: colours, matplotlib's defaults, structure names, closed figures and legends below them."""

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pairdiff_core.pairs import PairSet

# Okabe & Ito (2008): eight colours that people with any colour vision can distinguish
FIXED, MOVING = "#0072B2", "#E69F00"
GREEN, VERMILION, PURPLE, SKY, GREY = "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"
METHODS = ((GREY, "o"), (PURPLE, "s"), (GREEN, "D"), (VERMILION, "^"), (SKY, "v"), ("#000000", "P"))
LINES = "#333333"
MASKED = "#B8B8B8"

# Mostly Tol's "muted" scheme; neighbouring structures stay distinct under simulated colour blindness. Left and
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


def use_style() -> None:
    """Set matplotlib's defaults to the book's style; call it once at the top of a notebook."""
    sizes = {"font.size": 11, "axes.titlesize": 11}
    sizes |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 10)
    lines = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    lines |= {"grid.color": "#DDDDDD", "lines.linewidth": 1.8, "legend.frameon": False}
    lines |= {"axes.prop_cycle": matplotlib.cycler(color=[GREEN, VERMILION, PURPLE, SKY, GREY, "#000000"])}
    images = {"image.cmap": "cividis", "image.interpolation": "nearest"}
    layout = {"figure.dpi": 110, "figure.constrained_layout.use": True}
    plt.rcParams.update(sizes | lines | images | layout)


def structure_of(label_name: str) -> str:
    """The structure that a label belongs to: its name without the side."""
    return label_name.removeprefix("Left-").removeprefix("Right-")


def structure_colours(pairs: PairSet) -> np.ndarray:
    """Colour of each label, float (C, 3), RGB 0 to 1; the background is white.

    A structure listed in STRUCTURES has that colour; any other has the data set's own, or the next one of a cycle.
    """
    spare = cycle(STRUCTURES.values())
    colours = [to_rgb("white")]
    for label, name in enumerate(pairs.label_names[1:], start=1):
        if structure_of(name) not in STRUCTURES and pairs.label_colours is not None:
            colours.append(tuple(value / 255 for value in pairs.label_colours[label]))
        else:
            colours.append(to_rgb(STRUCTURES.get(structure_of(name)) or next(spare)))
    return np.array(colours)


def closed_figure(rows: int, columns: int, size: tuple[float, float], **gridspec: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches that pyplot has closed, and its Axes (rows, columns)."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **gridspec)
    plt.close(figure)  # otherwise pyplot shows it a second time at the end of the cell
    return figure, axes


def legend_below(figure: Figure, columns: int, colours: Mapping[str, Any] | None = None) -> None:
    """A legend below everything, for which the figure grows: of named colours, or of what the first Axes shows."""
    if colours is None:
        handles = figure.axes[0].get_legend_handles_labels()[0]
    else:
        edge = {"edgecolor": "#888888", "linewidth": 0.5}
        handles = [Patch(facecolor=colour, label=name, **edge) for name, colour in colours.items()]
    if handles:
        columns = max(1, min(columns, len(handles)))
        figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns) + 0.15)
        style = {"ncols": columns, "handlelength": 1.2, "columnspacing": 1.2}
        figure.legend(handles=handles, loc="outside lower center", **style)


def structure_legend(figure: Figure, pairs: PairSet, labels: torch.Tensor) -> None:
    """Name the structures that occur in ``labels`` below the figure; left and right share one entry."""
    names = [structure_of(name).replace("-", " ") for name in pairs.label_names]
    colours = structure_colours(pairs)
    present = {names[label]: colours[label] for label in labels.unique().tolist() if label > 0}
    legend_below(figure, int(figure.get_figwidth() / 1.9), present)
