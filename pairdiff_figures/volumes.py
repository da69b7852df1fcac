"""Figures of volumes: projections, slices, displacements and landmarks.

Axes are those of the lungs: 0 runs to the patient's left, 1 to the back, 2 upwards. Images follow the *radiological*
convention: coronal planes are seen from the front and axial ones from the feet, so the patient's right is on your
left; sagittal planes are seen from the patient's left, so the front is on your left. Letters at the edges say so:
R and L, A(nterior) and P(osterior), H(ead) and F(eet). All labels above 0 count as vessel. Fixed is blue, moving is
orange, and where both have a vessel it is dark grey. Slices are coronal.
"""

from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LightSource, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from scipy import ndimage

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet
from pairdiff_figures import style
from pairdiff_figures.style import FIXED, GREY, LINES, MOVING

CLASSES = np.array([to_rgb(colour) for colour in ("white", FIXED, MOVING, LINES)])  # of what `classes` returns
TOGETHER_MM = 2.0  # two vessels no farther apart in depth are drawn as one
FAR = 0.35  # strength of the colour of the farthest vessels in a projection; the nearest have 1
SHADES = 6  # levels of that strength: this halves the size of files, which look the same
LENGTHS = matplotlib.colormaps["viridis_r"].resampled(16)  # colours of lengths in millimetres
ARROWS = 250  # at most, in one image


class Plane(NamedTuple):
    """Which array axes an anatomical plane shows, and how it is drawn."""

    across: int  # drawn to the right
    along: int  # drawn upwards or downwards
    depth: int  # seen along this axis
    upward: bool
    near_is_low: bool  # whether low indices of ``depth`` are nearer to you
    letters: str  # at the left, right, top and bottom edge


PLANES = {
    "coronal": Plane(0, 2, 1, True, True, "RLHF"),
    "sagittal": Plane(1, 2, 0, True, False, "APHF"),
    "axial": Plane(0, 1, 2, False, True, "RLAP"),
}


def classes(fixed: torch.Tensor | None, moving: torch.Tensor | None) -> np.ndarray:
    """Where label maps (H, W, D) have a vessel: 0 neither, 1 fixed only, 2 moving only, 3 both; uint8 (H, W, D).

    One of the two may be None.
    """
    numbered = [(number, image) for number, image in ((1, fixed), (2, moving)) if image is not None]
    found = sum((image.numpy(force=True) > 0) * np.uint8(number) for number, image in numbered)
    if found.ndim != 3:
        raise ValueError(f"this draws volumes, not a grid of shape {found.shape}: figures.slices draws slices")
    return found


def project(
    found: np.ndarray, plane: str, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), slab_mm: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A maximum-intensity projection of vessels that get fainter with their distance from you.

    Each pixel thus shows the vessel nearest to you. Both images count as present if their nearest vessels are no more
    than TOGETHER_MM, or one voxel, apart in depth.

    Args:
        found: integers 0 to 3, (H, W, D), see :func:`classes`.
        spacing: mm along each array axis.
        slab_mm: only a slab of this thickness, around the slice in which the fixed image has the most vessel (the
            moving one if the fixed one has none); None takes the whole depth.

    Returns:
        The class of each pixel (across, along), and the strength of its colour: 0 (no vessel), or FAR to 1 (nearest).
    """
    view = PLANES[plane]
    found, mm = found.transpose(view.across, view.along, view.depth), spacing[view.depth]
    if slab_mm is not None:
        size = found.shape[2]
        thickness = min(size, max(1, round(slab_mm / mm)))
        of_fixed = found & 1
        fullest = int((of_fixed if of_fixed.any() else found).sum((0, 1)).argmax())
        start = min(max(0, fullest - thickness // 2), size - thickness)
        found = found[:, :, start : start + thickness]
    if not view.near_is_low:
        found = found[:, :, ::-1]
    each = np.stack([found & 1, found & 2])
    depth = np.where(each.any(3), each.argmax(3), np.inf)  # of the nearest vessel, (2, across, along)
    nearest = depth.min(0)
    fixed_there, moving_there = depth <= nearest + max(1.0, TOGETHER_MM / mm)
    hit = np.isfinite(nearest)
    strength = 1 - (1 - FAR) * nearest / max(1, found.shape[2] - 1)
    return np.where(hit, fixed_there + 2 * moving_there, 0), np.where(hit, strength, 0.0)


def show_projection(
    ax: Axes,
    fixed: torch.Tensor | None,
    moving: torch.Tensor | None,
    pairs: PairSet,
    plane: str,
    title: str = "",
    colour: str = GREY,
    slab_mm: float | None = None,
) -> None:
    """Draw the vessels of one or both images, seen through the whole volume or a slab; see :func:`project`.

    Images are uint8 (H, W, D), such as ``pairs.fixed[0]`` or a warped one; one of them may be None. ``pairs`` is the
    set they belong to, for the spacing, ``plane`` is one of PLANES, and ``colour`` that of the frame.
    """
    found, strength = project(classes(fixed, moving), plane, pairs.spacing, slab_mm)
    strength = np.ceil(SHADES * strength) / SHADES
    _show(ax, 1 - strength[..., None] * (1 - CLASSES[found]), pairs, plane, title, colour)


def show_from_the_front(ax: Axes, depth: torch.Tensor, spacing_mm: float, colour: str = GREY) -> None:
    """Draw vessels as lit surfaces, from a depth map uint8 (H, D) as in ``gallery`` of the results.

    Args:
        depth: voxels to the first one with a vessel, counted from 1; 0 where there is none.
        spacing_mm: of the voxels.
        colour: of the frame.
    """
    mm = spacing_mm * depth.numpy().astype(float)
    there = mm > 0
    weight = ndimage.gaussian_filter(there.astype(float), 0.7)
    smooth = ndimage.gaussian_filter(mm, 0.7) / np.maximum(weight, 1e-6)  # rounds the steps between voxels
    light = LightSource(azdeg=135, altdeg=55).hillshade(-smooth, dx=spacing_mm, dy=spacing_mm)
    near = mm[there].min(initial=np.inf)
    far = (mm - near) / max(1.0, mm.max() - near)
    shade = (0.25 + 0.6 * light) * (1 - 0.45 * far)
    picture = np.where(there, np.ceil(SHADES * shade) / SHADES, 1.0)[..., None].repeat(3, -1)
    view = PLANES["coronal"]
    style.show_image(ax, picture, (spacing_mm,) * 2, "", colour, "", view.upward)


def gallery_figure(depths: torch.Tensor, spacing_mm: float, columns: int = 6) -> Figure:
    """A closed figure of many volumes, each drawn by :func:`show_from_the_front` from its depth map, (N, H, D)."""
    rows = -(-len(depths) // columns)
    figure, axes = style.closed_figure(rows, columns, (1.1 * columns, 1.1 * rows))
    for ax, depth in zip(axes.flat, depths, strict=False):
        show_from_the_front(ax, depth, spacing_mm)
    return figure


def show_slice(ax: Axes, found: np.ndarray, pairs: PairSet, position: int, title: str) -> None:
    """Draw the coronal slice of ``found``, see :func:`classes`, at an index of array axis 1."""
    _show(ax, CLASSES[found[:, position]], pairs, "coronal", title)


def slice_position(pairs: PairSet, position: int) -> str:
    """Where a coronal slice lies, in words: its distance in mm from the edge of the volume."""
    return f"coronal, {pairs.spacing[1] * (position + 0.5):.0f} mm from the front"


def _show(
    ax: Axes, picture: np.ndarray, pairs: PairSet, plane: str, title: str, colour: str = GREY, **options: Any
) -> AxesImage:
    """Draw an image of a plane, with letters at its edges; see ``style.show_image``."""
    view = PLANES[plane]
    spacing = (pairs.spacing[view.across], pairs.spacing[view.along])
    return style.show_image(ax, picture, spacing, title, colour, view.letters, view.upward, **options)


def planes_figure(pairs: PairSet, planes: list[str], rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A closed figure for images of these planes at one scale, and its Axes (rows, planes)."""
    mm, views = style.field_of_view(pairs), [PLANES[plane] for plane in planes]
    return style.image_figure([mm[view.across] for view in views], [max(mm[view.along] for view in views)] * rows)


def classes_legend(figure: Figure, moving: str = "moving") -> None:
    """Name the colours of the vessels below the figure."""
    style.legend_below(figure, 3, {"fixed only": FIXED, f"{moving} only": MOVING, "both": LINES})


def volume_pair_figure(pairs: PairSet, slab_mm: float | None = None) -> Figure:
    """The first pair, seen from the front: the fixed image, the moving image, and both; see :func:`project`."""
    fixed, moving = pairs.labels[0]
    figure, [axes] = planes_figure(pairs, ["coronal"] * 3)
    show_projection(axes[0], fixed, None, pairs, "coronal", "fixed", FIXED, slab_mm)
    show_projection(axes[1], None, moving, pairs, "coronal", "moving", MOVING, slab_mm)
    show_projection(axes[2], fixed, moving, pairs, "coronal", "both", slab_mm=slab_mm)
    classes_legend(figure)
    return figure


def projections_figure(
    pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None, slab_mm: float | None = None
) -> Figure:
    """Both images of a pair, overlaid in three planes, before registration and, in a second row, after it.

    The displacement is float (3, H, W, D), voxels, fixed to moving; without one, there is no second row. Both rows show
    the same slab, see :func:`project`.
    """
    rows = {"before": pairs.moving[index]}
    if displacement is not None:
        rows["after"] = style.warped(pairs, index, displacement)
    figure, axes = planes_figure(pairs, list(PLANES), len(rows))
    for row, (when, moving) in enumerate(rows.items()):
        for ax, plane in zip(axes[row], PLANES, strict=True):
            title = plane if row == 0 else ""
            show_projection(ax, pairs.fixed[index], moving, pairs, plane, title, slab_mm=slab_mm)
        axes[row, 0].set_ylabel(when)
    classes_legend(figure, "moving" if displacement is None else "moving or warped")
    return figure


def displacement_figure(pairs: PairSet, displacement: torch.Tensor, index: int = 0) -> Figure:
    """A displacement in the middle slice: the vessels of the fixed image, its grid taken to moving, and |u| in mm.

    The displacement is float (3, H, W, D), voxels, fixed to moving. The grid shows it within the plane only; a black
    dot marks where the map folds, in any direction.
    """
    middle = pairs.spatial[1] // 2
    slab = displacement[:, :, middle - 1 : middle + 2].detach().cpu().float()  # derivatives need the neighbours
    folded = fields.jacobian_determinant(slab[None])[0, :, 1] <= 0
    u = slab[:, :, 1]  # (3, across, along)
    length = (u * torch.tensor(pairs.spacing).reshape(3, 1, 1)).norm(dim=0).numpy()
    figure, [axes] = planes_figure(pairs, ["coronal"] * 3)
    show_slice(axes[0], classes(pairs.fixed[index], None), pairs, middle, "fixed")
    _show(axes[1], np.ones((*length.shape, 3)), pairs, "coronal", "its grid in moving")
    style.deformed_grid(axes[1], u[[0, 2]], folded)
    image = _show(axes[2], length, pairs, "coronal", "how far it moves", cmap=LENGTHS, vmin=0)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="|u| in mm")
    figure.suptitle(slice_position(pairs, middle))
    figure.set_size_inches(figure.get_size_inches() + (0.4, 0.3))
    return figure


def landmark_figure(
    pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None, residual: bool = False
) -> Figure:
    """Arrows at the landmarks of a pair in the coronal and the sagittal plane, coloured by their 3D length in mm.

    Arrows run from each landmark x of the fixed image to that of the moving image; with a displacement, float (3, H, W,
    D), voxels, fixed to moving, to x + u(x), or, for the ``residual``, from x + u(x) to that of the moving image. All
    three have the same colours. ValueError if the pair has no landmarks.
    """
    if pairs.landmarks is None or not len(pairs.landmarks[index]):
        raise ValueError(f"{pairs.names[index]} has no landmarks to draw")
    points = pairs.landmarks[index]
    fixed, moving = points[:: -(-len(points) // ARROWS)].unbind(1)  # every k-th
    mm = torch.tensor(pairs.spacing)
    scale = Normalize(0, max(1e-6, float(((moving - fixed) * mm).norm(dim=1).max())))
    starts, ends, title = fixed, moving, "landmarks, fixed to moving"
    if displacement is not None:
        arrived = fixed + fields.sample_at(displacement.detach().cpu().float(), fixed)
        starts, ends = (arrived, moving) if residual else (fixed, arrived)
        title = "residual after registration" if residual else "landmarks, displaced"
    length = ((ends - starts) * mm).norm(dim=1)
    order = length.argsort()  # the longest arrows on top
    starts, arrows, length = starts[order], (ends - starts)[order], length[order]
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "edgecolor": LINES, "lw": 0.3}
    planes = ["coronal", "sagittal"]
    figure, [axes] = planes_figure(pairs, planes)
    for ax, plane in zip(axes, planes, strict=True):
        _, strength = project(classes(pairs.fixed[index], None), plane, pairs.spacing)
        _show(ax, 1 - 0.13 * strength[..., None].repeat(3, 2), pairs, plane, plane)
        view = PLANES[plane]
        xy, uv = (vectors[:, [view.across, view.along]].T.numpy() for vectors in (starts, arrows))
        drawn = ax.quiver(*xy, *uv, length.numpy(), cmap=LENGTHS, norm=scale, zorder=2, **arrow)
    figure.colorbar(drawn, ax=list(axes), shrink=0.8, label="length in mm")
    figure.suptitle(title)
    figure.set_size_inches(figure.get_size_inches() + (0.8, 0.3))
    return figure
