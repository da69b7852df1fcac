"""What slices and volumes share: size, frame, letters and scale bar of an image, a deformed grid, a warped image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke

from pairdiff_core import fields
from pairdiff_core.figures.style import FIXED, GREY, LINES, VERMILION, closed_figure
from pairdiff_core.pairs import PairSet

IMAGE, WIDTH = 2.9, 9.5  # inches, at most: width of one image and of a figure
SCALE_BARS = (100, 50, 20, 10, 5, 2, 1)  # millimetres


def field_of_view(pairs: PairSet) -> tuple[float, ...]:
    """Size of the images in millimetres along each array axis."""
    return tuple(size * mm for size, mm in zip(pairs.spatial, pairs.spacing, strict=True))


def image_figure(columns: Sequence[float], rows: Sequence[float], gap: float = 0.35) -> tuple[Figure, np.ndarray]:
    """A closed figure for images at one scale, and its Axes (rows, columns).

    The width of each column and the height of each row are in millimetres, the space between rows in inches.
    """
    scale = min(WIDTH / sum(columns), IMAGE / max(columns))
    size = (scale * sum(columns), scale * sum(rows) + gap * (len(rows) - 1) + 0.35)
    return closed_figure(len(rows), len(columns), size, width_ratios=columns)


def show_image(
    ax: Axes,
    picture: np.ndarray,
    spacing: Sequence[float],
    title: str = "",
    colour: str = GREY,
    letters: Mapping[tuple[float, float], str] | None = None,
    upward: bool = False,
    **style: Any,
) -> AxesImage:
    """Draw an image to scale in a coloured frame; voxel centres lie on integer coordinates.

    Args:
        picture: RGB, 0 to 1, (across, along, 3), or numbers (across, along) that ``style`` maps to colours.
        spacing: millimetres per voxel across and along.
        letters: anatomical directions by their position on the Axes, 0 to 1; a scale bar comes with them.
        upward: whether the second axis runs upwards rather than downwards.
    """
    if picture.ndim - ("cmap" not in style) != 2:
        raise ValueError(f"this draws 2D images, not a grid of shape {picture.shape[:-1]}: take one slice of it")
    across, along = picture.shape[:2]
    image = ax.imshow(picture.swapaxes(0, 1), interpolation="nearest", **style)
    limits = (-0.5, along - 0.5) if upward else (along - 0.5, -0.5)
    ax.set(xlim=(-0.5, across - 0.5), ylim=limits, xticks=[], yticks=[], title=title)
    ax.set_aspect(spacing[1] / spacing[0])
    ax.spines[:].set(visible=True, color=colour, linewidth=0.6 if colour == GREY else 2.5)
    if letters:
        halo = [withStroke(linewidth=2.5, foreground="white")]  # keeps letters readable on dark ground
        text = {"transform": ax.transAxes, "color": LINES, "path_effects": halo, "zorder": 4}
        for (x, y), letter in letters.items():
            ha, va = ("left", "center", "right")[round(2 * x)], ("bottom", "center", "top")[round(2 * y)]
            ax.text(x, y, letter, ha=ha, va=va, fontweight="bold", **text)
        width = across * spacing[0]  # mm
        length = next((mm for mm in SCALE_BARS if mm <= 0.35 * width), 1)
        ax.text(0.04, 0.055, f"{length} mm", fontsize="small", va="bottom", **text)
        text["path_effects"] = [withStroke(linewidth=4.5, foreground="white")]
        ax.plot([0.04, 0.04 + length / width], [0.035, 0.035], lw=2.5, solid_capstyle="butt", **text)
    return image


def deformed_grid(ax: Axes, displacement: torch.Tensor, folded: torch.Tensor) -> None:
    """Draw a regular grid moved by a displacement (2, across, along) in voxels, and a dot wherever it folded."""
    grid = (fields.identity_grid(displacement.shape[1:]) + displacement).numpy()
    step = max(1, round(max(folded.shape) / 32))  # about 32 lines along the longer side
    first = step // 2
    lines = [*grid[:, first::step].transpose(1, 2, 0), *grid[:, :, first::step].transpose(2, 1, 0)]  # (K, 2)
    ax.add_collection(LineCollection(lines, colors=FIXED, linewidths=0.7))
    if folded.any():
        ax.scatter(*grid[:, folded.numpy()], s=4, color=VERMILION, zorder=3, label="folded")
        ax.legend(loc="lower right", frameon=True, framealpha=1, handletextpad=0.1, borderpad=0.2)


def warped(pairs: PairSet, index: int, displacement: torch.Tensor) -> torch.Tensor:
    """The moving image of one pair, uint8 (*spatial), warped by its displacement (D, *spatial) in voxels."""
    return fields.warp_labels(pairs.moving[index, None], displacement.detach().cpu().float()[None])[0]
