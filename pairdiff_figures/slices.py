"""Figures of 2D slices: label maps, overlaps, deformed grids and tokens.

Array axis 0 runs to the right and axis 1 downwards. Images are uint8 (H, W), such as ``pairs.fixed[0]`` or a warped
one; the set that they belong to gives names, colours and spacing.
"""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet
from pairdiff_figures import style
from pairdiff_figures.style import FIXED, GREY, MASKED, MOVING


def sides(image: np.ndarray, pairs: PairSet) -> str:
    """Letters for the patient's sides, from left to right, according to the labels named Left- and Right-.

    Without such labels, left is at low indices of array axis 0: the data sets are loaded that way.
    """
    both = (np.array([name.startswith(side) for name in pairs.label_names]) for side in ("Left-", "Right-"))
    left, right = (np.nonzero(side[image])[0] for side in both)
    return "RL" if left.size and right.size and left.mean() > right.mean() else "LR"


def show_labels(
    ax: Axes, image: torch.Tensor, pairs: PairSet, title: str = "", colour: str = GREY, marks: bool = False
) -> None:
    """Draw a label map in a frame of a ``colour``; FIXED and MOVING distinguish the two images.

    ``marks`` adds a scale bar and the patient's sides; one image in a row is enough.
    """
    array = image.numpy(force=True)
    letters = sides(array, pairs) if marks else ""
    style.show_image(ax, style.structure_colours(pairs)[array], pairs.spacing, title, colour, letters)


def show_overlap(
    ax: Axes, fixed: torch.Tensor, moving: torch.Tensor, pairs: PairSet, title: str = "", marks: bool = False
) -> None:
    """Draw the outlines of all structures of the fixed (blue) and the moving or warped image (orange).

    Voxels are grey where the two agree on a structure; ``marks`` as in :func:`show_labels`.
    """
    a, b = fixed.numpy(force=True), moving.numpy(force=True)
    ground = np.where(((a == b) & (a > 0))[..., None], np.full(3, 0.88), 1.0)
    style.show_image(ax, ground, pairs.spacing, title, letters=sides(a, pairs) if marks else "")
    for image, colour in ((a, FIXED), (b, MOVING)):
        padded = np.pad(image, 1)  # closes the outline of a structure that the edge of the image cuts
        x, y = (np.arange(-1, size + 1) for size in image.shape)
        for label in np.unique(image[image > 0]):
            ax.contour(x, y, (padded == label).T, levels=[0.5], colors=colour, linewidths=0.9)


def show_grid(ax: Axes, displacement: torch.Tensor, pairs: PairSet, title: str = "") -> None:
    """Draw a regular grid of the fixed image where the displacement takes it in the moving image: x + u(x).

    The displacement is float (2, H, W), voxels, fixed to moving. A black dot marks where the map folds.
    """
    u = displacement.detach().cpu()
    style.show_image(ax, np.ones((*u.shape[1:], 3)), pairs.spacing, title)
    style.deformed_grid(ax, u, fields.jacobian_determinant(u[None])[0] <= 0)


def show_tokens(ax: Axes, tokens: torch.Tensor, mask_token: int | None = None, title: str = "") -> None:
    """Draw a grid of tokens, integers (H, W), with a colour for each code; similar colours mean nothing.

    Grey stands for ``mask_token``, the integer of a masked token, if there is one.
    """
    array = tokens.numpy(force=True)
    hue = array * 0.6180339887 % 1.0  # the golden ratio keeps the hues of successive codes apart
    saturation, value = np.array([1.0, 0.65, 0.4])[array % 3], np.array([0.8, 0.9, 0.95])[array % 3]
    colours = hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))
    if mask_token is not None:
        colours[array == mask_token] = to_rgb(MASKED)
    ax.imshow(colours.swapaxes(0, 1), interpolation="nearest")
    ax.set(xticks=np.arange(array.shape[0] + 1) - 0.5, yticks=np.arange(array.shape[1] + 1) - 0.5, title=title)
    ax.grid(color="white", linewidth=1)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    ax.spines[:].set_visible(False)


def pair_figure(pairs: PairSet) -> Figure:
    """The first pair: the fixed image, the moving image, and the outlines of both."""
    width, height = style.field_of_view(pairs)
    fixed, moving = pairs.labels[0]
    figure, [axes] = style.image_figure([width] * 3, [height])
    show_labels(axes[0], fixed, pairs, "fixed", FIXED, marks=True)
    show_labels(axes[1], moving, pairs, "moving", MOVING)
    show_overlap(axes[2], fixed, moving, pairs, "outlines of both")
    _structure_legend(figure, pairs, pairs.labels[0])
    return figure


def pairs_figure(sets: PairSet | Mapping[str, PairSet]) -> Figure:
    """The first two pairs of one or several sets, such as real and synthetic pairs, or pairs and reconstructions.

    ``sets`` is a PairSet, or maps the names of rows to several. Each pair takes two columns.
    """
    named = {"": sets} if isinstance(sets, PairSet) else sets
    first = next(iter(named.values()))
    number = min(2, *(len(pairs) for pairs in named.values()))
    width, height = style.field_of_view(first)
    columns = [width, width, 0.06 * width] * number  # a gap after each pair
    figure, axes = style.image_figure(columns, [height] * len(named), gap=0.1)
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

    Displacements are float (N, 2, H, W), voxels, fixed to moving, one for each pair of the set.
    """
    width, height = style.field_of_view(pairs)
    fixed, moving = pairs.labels[index]
    moved = style.warped(pairs, index, displacement[index])
    figure, axes = style.image_figure([width] * 3, [height] * 2)
    show_labels(axes[0, 0], fixed, pairs, "fixed", FIXED, marks=True)
    show_labels(axes[0, 1], moving, pairs, "moving", MOVING)
    show_labels(axes[0, 2], moved, pairs, "moving, warped", MOVING)
    show_overlap(axes[1, 0], fixed, moving, pairs, "outlines before")
    show_overlap(axes[1, 1], fixed, moved, pairs, "outlines after")
    show_grid(axes[1, 2], displacement[index], pairs, "its grid in moving")
    _structure_legend(figure, pairs, pairs.labels[index])
    return figure


def labels_gallery_figure(labels: torch.Tensor, pairs: PairSet, columns: int = 6) -> Figure:
    """A closed figure of many label maps, uint8 (N, H, W), such as ``pairs.fixed[:24]``, in the order given."""
    width, height = style.field_of_view(pairs)
    figure, axes = style.image_figure([width] * columns, [height] * -(-len(labels) // columns), gap=0.1)
    for ax in axes.flat[len(labels) :]:
        ax.set_axis_off()
    for number, (ax, image) in enumerate(zip(axes.flat, labels, strict=False)):
        show_labels(ax, image, pairs, marks=number == 0)
    _structure_legend(figure, pairs, labels)
    return figure


def _structure_legend(figure: Figure, pairs: PairSet, labels: torch.Tensor) -> None:
    """Name the structures that occur in ``labels`` below the figure; left and right share one entry."""
    colours = style.structure_colours(pairs)
    present = [label for label in labels.unique().tolist() if label > 0]
    named = {style.structure_of(pairs.label_names[label]).replace("-", " "): colours[label] for label in present}
    style.legend_below(figure, len(named), named)
