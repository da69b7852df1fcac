"""Figures of grey images of 2D slices: float (N, 1, H, W), 0 to 1."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from pairdiff_figures import style


def images_figure(rows: Mapping[str, torch.Tensor], spacing: Sequence[float], columns: int = 6) -> Figure:
    """The first images of some sets, one named set per row; black is 0 and white is 1.

    Args:
        rows: float (N, 1, H, W) by name; a set may have fewer images than there are columns.
        columns: at most.
        spacing: millimetres per voxel along both array axes.
    """
    size = next(iter(rows.values())).shape[2:]
    width, height = (voxels * mm for voxels, mm in zip(size, spacing, strict=True))
    columns = min(columns, max(map(len, rows.values())))
    figure, axes = style.image_figure([width] * columns, [height] * len(rows), gap=0.1)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1}
    for number, (line, (name, images)) in enumerate(zip(axes, rows.items(), strict=True)):
        for ax in line[len(images) :]:
            ax.set_axis_off()
        for ax, image in zip(line, images, strict=False):
            first = ax is line[0]
            letters = "LR" if first and number == 0 else ""  # data sets are loaded with left at low indices
            style.show_image(ax, image[0].numpy(force=True), spacing, letters=letters, **grey)
        line[0].set_ylabel(name)
    return figure
