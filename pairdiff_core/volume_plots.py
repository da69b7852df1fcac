"""The figures of volumes: projections, slices, displacements and landmark errors, in the style of :mod:`plots`.

Axes are those of the lungs: 0 runs to the patient's left, 1 to the back, 2 upwards. Pictures follow the
*radiological* convention: coronal planes are seen from the front and axial ones from the feet, so the patient's
right is on your left; sagittal planes are seen from the patient's left, so the front is on your left. Letters at
the edges say so: R and L, A(nterior) and P(osterior), H(ead) and F(eet). Fixed is blue, moving is orange, and where
both have a vessel it is dark grey. A picture is drawn in voxel coordinates (voxel centres on integers), stretched so
that a millimetre is as long across as it is down.

All labels above 0 count as vessel. Figures are already closed for pyplot, as in :mod:`plots`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import ipywidgets
import matplotlib
import numpy as np
import torch
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet
from pairdiff_core.plots import (
    FIXED,
    GREY,
    LINES,
    METHODS,
    MOVING,
    VERMILION,
    WIDTH,
    closed_figure,
    legend_below,
    player,
)

BOTH = LINES  # where fixed and moving agree on a vessel
CLASSES = np.array([to_rgb(colour) for colour in ("white", FIXED, MOVING, BOTH)])
TOGETHER_MM = 2.0  # apart in depth, two vessels in a projection are drawn as one
FAR = 0.35  # strength of the colour of what lies farthest from you in a projection; the nearest has 1
SHADES = 6  # steps of that strength in a picture: files get half as large, and looks stay
LENGTHS = matplotlib.colormaps["viridis_r"].resampled(16)  # colours of lengths in millimetres
ARROWS = 250  # at most, in one picture
BLENDS = 5  # steps from fixed to warped in the widget
PLAYER_SLICES = 20  # at most: keeps a player of full-size volumes below 250 kB
WIDGET_SLICES = 12
WIDGET_PIXELS = 320  # width of a slice in the widget, at least, if that takes no more than 8 pixels a voxel


HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps letters readable on dark ground
BAR_HALO = [withStroke(linewidth=4.5, foreground="white")]
NOTHING = "neither a fixed nor a moving image was given: there is nothing to draw"


class Plane(NamedTuple):
    """How one anatomical plane is drawn: array axes, and the letters at its left, right, top and bottom edge."""

    across: int  # drawn to the right, from low to high indices
    along: int  # drawn upwards if it is axis 2, else downwards
    depth: int  # seen along this axis
    near_is_low: bool  # whether low indices of ``depth`` are nearer to you
    letters: str
    origin: str  # from where the millimetres of a slice are counted

    @property
    def upward(self) -> bool:
        return self.along == 2


PLANES = {
    "coronal": Plane(0, 2, 1, True, "RLHF", "front"),
    "sagittal": Plane(1, 2, 0, False, "APHF", "right"),
    "axial": Plane(0, 1, 2, True, "RLAP", "bottom"),
}


# ---- one picture on an Axes


def project(
    fixed: torch.Tensor | None,
    moving: torch.Tensor | None,
    plane: str,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    slab_mm: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A maximum-intensity projection of vessels that get fainter with their distance from you.

    The maximum over each line of sight then is the vessel nearest to you, and each pixel shows one place, not a
    mixture of several. The two images count as both there if their nearest vessels are no more than TOGETHER_MM, or
    one voxel, apart in depth.

    Args:
        fixed, moving: labels, integers (H, W, D); one of them may be None.
        plane: one of PLANES.
        spacing: mm along each array axis.
        slab_mm: only so much of the depth, around the slice of the fixed image with the most vessel (of the moving one
            if there is no fixed one); None takes all of it.

    Returns:
        Which images have a vessel at that place, (across, along): 0 none, 1 fixed only, 2 moving only, 3 both; and how
        strong it is, 0 (none) or FAR (farthest) to 1 (nearest).
    """
    view = PLANES[plane]
    depths = []
    for image in (fixed, moving):
        volume = None if image is None else _mask(image).transpose(view.across, view.along, view.depth)
        depths.append(volume)
    given = next((volume for volume in depths if volume is not None), None)
    if given is None:
        raise ValueError(NOTHING)
    size, mm = given.shape[2], spacing[view.depth]
    part = slice(0, size)
    if slab_mm is not None:
        thickness = min(size, max(1, round(slab_mm / mm)))
        start = min(max(0, int(given.sum((0, 1)).argmax()) - thickness // 2), size - thickness)
        part = slice(start, start + thickness)
    first = []
    for volume in depths:  # how deep the nearest vessel lies, inf where there is none
        if volume is None:
            first.append(np.full(given.shape[:2], np.inf))
            continue
        seen = volume[:, :, part] if view.near_is_low else volume[:, :, part][:, :, ::-1]
        first.append(np.where(seen.any(2), seen.argmax(2), np.inf))
    nearest = np.minimum(*first)
    hit = np.isfinite(nearest)
    reach = max(1.0, TOGETHER_MM / mm)  # voxels
    classes = sum(
        number * (hit & (depth <= np.where(hit, nearest, 0) + reach))
        for number, depth in zip((1, 2), first, strict=True)
    )
    length = max(1, part.stop - part.start - 1)
    return classes, np.where(hit, 1 - (1 - FAR) * np.where(hit, nearest, 0) / length, 0.0)


def show_projection(
    ax: Axes,
    fixed: torch.Tensor | None,
    moving: torch.Tensor | None,
    pairs: PairSet,
    plane: str = "coronal",
    title: str = "",
    colour: str = GREY,
    slab_mm: float | None = None,
) -> None:
    """Draw the vessels of one or both images, seen through the whole volume; see :func:`project`.

    Args:
        fixed, moving: labels, uint8 (H, W, D), such as ``pairs.fixed[0]`` or a warped one; one of them may be None.
        pairs: the set they belong to, for the spacing.
        plane: one of PLANES.
        colour: of the frame.
        slab_mm: see :func:`project`.
    """
    classes, strength = project(fixed, moving, plane, pairs.spacing, slab_mm)
    strength = np.ceil(SHADES * strength) / SHADES
    picture = 1 - strength[..., None] * (1 - CLASSES[classes])  # (across, along, RGB)
    _draw(ax, picture, pairs, plane, title, colour)


def show_slice(
    ax: Axes,
    fixed: torch.Tensor | None,
    moving: torch.Tensor | None,
    pairs: PairSet,
    plane: str = "coronal",
    position: int | None = None,
    title: str | None = None,
) -> None:
    """Draw one slice of the vessels of one or both images: blue, orange, and dark grey where both have a vessel.

    Args:
        fixed, moving: labels, uint8 (H, W, D); one of them may be None.
        position: index of the slice along the plane's depth; None takes the middle one.
        title: None says where the slice is.
    """
    view = PLANES[plane]
    position = pairs.spatial[view.depth] // 2 if position is None else position
    classes = _classes(fixed, moving).take(position, view.depth)
    if view.across > view.along:
        classes = classes.T
    place = slice_place(pairs, plane, position)
    _draw(ax, CLASSES[classes], pairs, plane, place if title is None else title)


def slice_place(pairs: PairSet, plane: str, position: int) -> str:
    """Where a slice is, in words: its plane and its distance in mm from the edge of the volume."""
    view = PLANES[plane]
    return f"{plane}, {pairs.spacing[view.depth] * (position + 0.5):.0f} mm from the {view.origin}"


def show_volume_grid(
    ax: Axes,
    displacement: torch.Tensor,
    pairs: PairSet,
    plane: str = "coronal",
    position: int | None = None,
    title: str = "",
) -> None:
    """Draw a regular grid in one slice of the fixed image where the displacement takes it in the moving image.

    Only the part of the displacement within the plane can be seen; a dot marks where the map folds, in any direction.

    Args:
        displacement: float (3, H, W, D), voxels, fixed to moving.
        position: index of the slice along the plane's depth; None takes the middle one.
    """
    _need_3d(displacement.shape[1:])
    view = PLANES[plane]
    position = pairs.spatial[view.depth] // 2 if position is None else position
    low = max(0, position - 1)  # its neighbours, for the derivatives
    u = displacement.detach().cpu().narrow(1 + view.depth, low, min(3, pairs.spatial[view.depth] - low))
    folded = fields.jacobian_determinant(u[None])[0].select(view.depth, position - low).numpy() <= 0
    within = u.select(1 + view.depth, position - low)[[view.across, view.along]]  # (2, across, along)
    place = (fields.identity_grid(within.shape[1:]) + within).numpy()
    step = max(1, round(max(place.shape[1:]) / 32))
    lines = [place[:, i].T for i in range(step // 2, place.shape[1], step)]
    lines += [place[:, :, i].T for i in range(step // 2, place.shape[2], step)]
    ax.add_collection(LineCollection(lines, colors=FIXED, linewidths=0.7))
    if folded.any():
        ax.scatter(*place[:, folded], s=4, color=VERMILION, zorder=3, label="folded")
        ax.legend(loc="lower right", frameon=True, framealpha=1, handletextpad=0.1, borderpad=0.2)
    _frame(ax, place.shape[1:], pairs, plane, title)


def show_arrows(
    ax: Axes,
    starts: torch.Tensor,
    ends: torch.Tensor,
    pairs: PairSet,
    plane: str = "coronal",
    title: str = "",
    longest: float | None = None,
) -> Any:
    """Draw arrows between points, seen through the whole volume, coloured by their length in 3D.

    Args:
        starts, ends: float (K, 3), voxels.
        longest: mm, the end of the colour scale; None takes the longest arrow.

    Returns:
        What a colour bar is made of.
    """
    view = PLANES[plane]
    a, b = (points.detach().cpu().numpy() for points in (starts, ends))
    length = np.linalg.norm((b - a) * np.array(pairs.spacing), axis=1)
    longest = max(float(length.max(initial=0.0)) if longest is None else longest, 1e-6)
    order = length.argsort()  # the longest on top
    x, y = (a[order, axis] for axis in (view.across, view.along))
    u, v = ((b - a)[order, axis] for axis in (view.across, view.along))
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "zorder": 2}
    arrows = ax.quiver(
        x, y, u, v, length[order], cmap=LENGTHS, norm=Normalize(0, longest), edgecolor=LINES, lw=0.3, **style
    )
    _frame(ax, [pairs.spatial[axis] for axis in (view.across, view.along)], pairs, plane, title)
    return arrows


def _mask(image: torch.Tensor) -> np.ndarray:
    """Where there is a vessel, bool (H, W, D)."""
    _need_3d(image.shape)
    return image.detach().cpu().numpy() > 0


def _classes(fixed: torch.Tensor | None, moving: torch.Tensor | None) -> np.ndarray:
    """0 no vessel, 1 in fixed only, 2 in moving only, 3 in both, uint8 (H, W, D)."""
    numbered = ((fixed, 1), (moving, 2))
    found = [_mask(image) * np.uint8(number) for image, number in numbered if image is not None]
    if not found:
        raise ValueError(NOTHING)
    return sum(found[1:], found[0])


def _need_3d(shape: Sequence[int]) -> None:
    if len(shape) != 3:
        raise ValueError(f"only volumes can be drawn here, not a grid of shape {tuple(shape)}: see plots")


def _draw(ax: Axes, picture: np.ndarray, pairs: PairSet, plane: str, title: str, colour: str = GREY) -> None:
    """An RGB picture (across, along, 3) with its frame."""
    ax.imshow(picture.swapaxes(0, 1), interpolation="nearest", aspect="auto")
    _frame(ax, picture.shape[:2], pairs, plane, title, colour)


def _frame(
    ax: Axes, shape: Sequence[int], pairs: PairSet, plane: str, title: str, colour: str = GREY
) -> None:
    """The whole field of view, head or front up, with letters at its edges and a scale bar, and no ticks."""
    view = PLANES[plane]
    across, along = shape
    ax.set_aspect(pairs.spacing[view.along] / pairs.spacing[view.across])
    limits = (-0.5, along - 0.5) if view.upward else (along - 0.5, -0.5)
    ax.set(xlim=(-0.5, across - 0.5), ylim=limits, xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=colour, linewidth=0.6 if colour == GREY else 2.5)
    ax.set_title(title)
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.985, "center", "top"), (0.5, 0.015, "center", "bottom"))
    style = {"color": LINES, "zorder": 4}
    for letter, (x, y, ha, va) in zip(view.letters, places, strict=True):
        text = ax.text(x, y, letter, transform=ax.transAxes, ha=ha, va=va, fontweight="bold", **style)
        text.set_path_effects(HALO)
    size = across * pairs.spacing[view.across]  # mm
    length = next((mm for mm in (100, 50, 20, 10, 5, 2, 1) if mm <= 0.3 * size), 1)
    ends = ([0.04, 0.04 + length / size], [0.035, 0.035])
    ax.plot(
        *ends, transform=ax.transAxes, linewidth=2.5, solid_capstyle="butt", path_effects=BAR_HALO, **style
    )
    text = ax.text(
        0.04, 0.055, f"{length} mm", transform=ax.transAxes, fontsize="small", va="bottom", **style
    )
    text.set_path_effects(HALO)


# ---- finished figures


def volume_pair_figure(
    pairs: PairSet, index: int = 0, plane: str = "coronal", slab_mm: float | None = None
) -> Figure:
    """One pair as projections: the fixed image, the moving image, and both; for ``slab_mm`` see :func:`project`."""
    one = pairs[index]
    fixed, moving = one.fixed[0], one.moving[0]
    figure, axes = closed_figure(1, 3, _size(pairs, [[plane] * 3]))
    show_projection(axes[0, 0], fixed, None, pairs, plane, "fixed", FIXED, slab_mm)
    show_projection(axes[0, 1], None, moving, pairs, plane, "moving", MOVING, slab_mm)
    show_projection(axes[0, 2], fixed, moving, pairs, plane, "both", slab_mm=slab_mm)
    legend_below(figure, _classes_legend("moving"), columns=3)
    return figure


def projections_figure(
    pairs: PairSet,
    index: int = 0,
    displacement: torch.Tensor | None = None,
    slab_mm: float | None = None,
) -> Figure:
    """Both images of a pair over each other in three planes, before registration and, in a second row, after it.

    Args:
        displacement: float (3, H, W, D) of that pair, voxels, fixed to moving; None leaves the second row out.
        slab_mm: see :func:`project`; both rows show the same slab.
    """
    one = pairs[index]
    rows = {"before": one.moving[0]}
    if displacement is not None:
        rows["after"] = _warped(one, displacement)
    widths = [pairs.spatial[view.across] * pairs.spacing[view.across] for view in PLANES.values()]
    figure, axes = closed_figure(len(rows), 3, _size(pairs, [list(PLANES)] * len(rows)), width_ratios=widths)
    for row, (when, moving) in enumerate(rows.items()):
        for ax, plane in zip(axes[row], PLANES, strict=True):
            title = plane if row == 0 else ""
            show_projection(ax, one.fixed[0], moving, pairs, plane, title, slab_mm=slab_mm)
        axes[row, 0].set_ylabel(when)
    legend_below(figure, _classes_legend("moving" if len(rows) == 1 else "moving or warped"), columns=3)
    return figure


def displacement_figure(
    pairs: PairSet,
    displacement: torch.Tensor,
    index: int = 0,
    plane: str = "coronal",
    position: int | None = None,
) -> Figure:
    """A displacement in one slice: the vessels of the fixed image there, its grid taken to moving, and |u| in mm.

    Args:
        displacement: float (3, H, W, D) of that pair, voxels, fixed to moving.
        position: index of the slice along the plane's depth; None takes the middle one.
    """
    view = PLANES[plane]
    position = pairs.spatial[view.depth] // 2 if position is None else position
    u = displacement.detach().cpu().float()
    figure, axes = closed_figure(1, 3, _size(pairs, [[plane] * 3]))
    show_slice(axes[0, 0], pairs[index].fixed[0], None, pairs, plane, position, "fixed")
    show_volume_grid(axes[0, 1], u, pairs, plane, position, "fixed grid, taken to moving")
    mm = torch.tensor(pairs.spacing).reshape(3, 1, 1)
    length = (u.select(1 + view.depth, position) * mm).norm(dim=0).numpy()  # (across, along)
    image = axes[0, 2].imshow(length.T, cmap=LENGTHS, vmin=0, interpolation="nearest", aspect="auto")
    _frame(axes[0, 2], length.shape, pairs, plane, "how far it moves")
    figure.colorbar(image, ax=list(axes[0]), shrink=0.8, label="|u| in mm")
    figure.suptitle(slice_place(pairs, plane, position))
    figure.set_size_inches(figure.get_figwidth() + 0.4, figure.get_figheight() + 0.3)
    return figure


def landmark_figure(
    pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None, remaining: bool = False
) -> Figure:
    """Arrows at the landmarks of a pair in the coronal and the sagittal plane, coloured by their length in mm.

    Args:
        displacement: float (3, H, W, D) of that pair, voxels, fixed to moving. An arrow then runs from a landmark x of
            the fixed image to x + u(x); without, to its partner in the moving image.
        remaining: with a displacement, what is left of the way: from x + u(x) to the partner. The colours still end
            at the longest way between two partners, so that before and after can be compared.

    Raises:
        ValueError: if the pair has no landmarks.
    """
    if pairs.landmarks is None or not len(pairs.landmarks[index]):
        raise ValueError(f"{pairs.names[index]} has no landmarks to draw")
    points = pairs.landmarks[index]
    points = points[:: -(-len(points) // ARROWS)]  # every k-th
    fixed, moving = points.unbind(1)
    starts, ends, title = fixed, moving, "landmarks, fixed to moving"
    if displacement is not None:
        arrived = fixed + fields.sample_at(displacement.detach().cpu().float(), fixed)
        starts, ends = (arrived, moving) if remaining else (fixed, arrived)
        title = "what is left after registration" if remaining else "landmarks, displaced"
    longest = float(((moving - fixed) * torch.tensor(pairs.spacing)).norm(dim=1).max())
    planes = ["coronal", "sagittal"]
    widths = [pairs.spatial[PLANES[plane].across] * pairs.spacing[PLANES[plane].across] for plane in planes]
    figure, axes = closed_figure(1, 2, _size(pairs, [planes]), width_ratios=widths)
    for ax, plane in zip(axes[0], planes, strict=True):
        classes, strength = project(pairs[index].fixed[0], None, plane, pairs.spacing)
        faint = 1 - 0.13 * (strength * (classes > 0))[..., None].repeat(3, 2)
        ax.imshow(faint.swapaxes(0, 1), interpolation="nearest", aspect="auto")
        arrows = show_arrows(ax, starts, ends, pairs, plane, plane, longest)
    figure.colorbar(arrows, ax=list(axes[0]), shrink=0.8, label="length in mm")
    figure.set_size_inches(figure.get_figwidth() + 0.8, figure.get_figheight() + 0.3)
    figure.suptitle(title)
    return figure


def error_curves_figure(errors: Mapping[str, torch.Tensor]) -> Figure:
    """Cumulative landmark errors: for each method, the share of landmarks that are at most x mm off.

    Args:
        errors: method to target registration errors, float (K,), mm, such as
            ``metrics.target_registration_error`` gives; K may differ. A method keeps its colour and marker by its
            place. The marker is the median. The axis ends where 99 % of the landmarks of each method are shown.
    """
    figure, axes = closed_figure(1, 1, (7.5, 3.6))
    ax = axes[0, 0]
    end = 0.0
    for (method, values), (colour, marker) in zip(errors.items(), cycle(METHODS)):  # noqa: B905, one is endless
        mm = values.detach().cpu().double().sort().values.numpy()
        if not len(mm):
            raise ValueError(f"there are no landmark errors of {method!r}")
        share = 100 * np.arange(len(mm) + 1) / len(mm)
        median = float(np.median(mm))
        ax.step([0, *mm], share, where="post", color=colour)
        ax.plot(
            median,
            50,
            marker,
            color=colour,
            markersize=8,
            label=f"{method}: median {median:.1f} mm",
            zorder=3,
        )
        end = max(end, float(np.quantile(mm, 0.99)))
    ax.axhline(50, color=LINES, linewidth=0.8, linestyle="--", zorder=0)
    ax.set(xlim=(0, max(end, 1e-6)), ylim=(0, 100))
    ax.set(xlabel="target registration error, mm", ylabel="% of the landmarks within")
    ax.grid()
    ax.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def _warped(one: PairSet, displacement: torch.Tensor) -> torch.Tensor:
    """The moving labels of a set of one pair, warped by (3, H, W, D): uint8 (H, W, D)."""
    _need_3d(displacement.shape[1:])
    return fields.warp_labels(one.moving, displacement.detach().cpu().float()[None])[0]


def _classes_legend(moving: str) -> list[Patch]:
    names = {"fixed only": FIXED, f"{moving} only": MOVING, "both": BOTH}
    return [Patch(facecolor=colour, label=name) for name, colour in names.items()]


def _size(pairs: PairSet, rows: Sequence[Sequence[str]], title: float = 0.35) -> tuple[float, float]:
    """Width and height in inches of a figure with so many rows of planes, all at one scale."""
    mm = [size * step for size, step in zip(pairs.spatial, pairs.spacing, strict=True)]
    scale = min(WIDTH / sum(mm[PLANES[plane].across] for plane in rows[0]), 3.0 / max(mm))
    width = scale * sum(mm[PLANES[plane].across] for plane in rows[0])
    height = sum(scale * max(mm[PLANES[plane].along] for plane in row) + title for row in rows)
    return width + 0.1 * len(rows[0]), height


# ---- to leaf through


def slices_with_vessels(pairs: PairSet, index: int, plane: str, number: int) -> list[int]:
    """At most ``number`` positions, evenly spread from the first slice of a pair to show vessels to the last one.

    A slice with less than a twentieth of what the fullest one has does not count: the first picture would look empty.
    """
    depth = PLANES[plane].depth
    others = [axis for axis in range(3) if axis != depth]
    filled = (pairs.labels[index].numpy() > 0).any(0).sum(tuple(others))
    there = np.flatnonzero(filled >= 0.05 * filled.max())
    if not filled.any():
        return [pairs.spatial[depth] // 2]
    low, high = int(there[0]), int(there[-1])
    return np.unique(np.linspace(low, high, min(number, high - low + 1)).round().astype(int)).tolist()


def slices_animation(
    pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None, plane: str = "coronal"
) -> HTML:
    """A player with a slider that goes through the slices of a pair: both images before, and after registration.

    It needs no kernel and no network.

    Args:
        displacement: float (3, H, W, D) of that pair, voxels, fixed to moving; None shows the pair as it is only.
    """
    one = pairs[index]
    panels = {"": one.moving[0]}
    if displacement is not None:
        panels = {"before": one.moving[0], "after": _warped(one, displacement)}
    places = slices_with_vessels(pairs, index, plane, PLAYER_SLICES)
    figure, axes = closed_figure(1, len(panels), _size(pairs, [[plane] * len(panels)]))
    figure.set_figheight(figure.get_figheight() + 0.3)
    legend_below(figure, _classes_legend("moving" if displacement is None else "moving or warped"), columns=3)
    above = figure.suptitle(" ")

    def draw(frame: int) -> None:
        above.set_text(slice_place(pairs, plane, places[frame]))
        for ax, (when, moving) in zip(axes[0], panels.items(), strict=True):
            ax.clear()
            show_slice(ax, one.fixed[0], moving, pairs, plane, places[frame], when)

    return player(figure, draw, len(places), f"The {plane} slices of a pair of volumes, one after the other.")


def slices_widget(
    pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None, plane: str = "coronal"
) -> ipywidgets.VBox:
    """A widget with two sliders: leaf through slices, and blend from the fixed image to the warped one.

    Every picture is made beforehand and the sliders are linked in the browser, so it works in JupyterLab and, just as
    well, in a static page without a kernel.

    Args:
        displacement: float (3, H, W, D) of that pair, voxels, fixed to moving; None blends to the moving image.
        plane: one of PLANES.
    """
    one, view = pairs[index], PLANES[plane]
    moving = one.moving[0] if displacement is None else _warped(one, displacement)
    classes = _classes(one.fixed[0], moving)
    places = slices_with_vessels(pairs, index, plane, WIDGET_SLICES)
    across, along = (pairs.spatial[axis] * pairs.spacing[axis] for axis in (view.across, view.along))  # mm
    times = min(8, max(1, -(-WIDGET_PIXELS // pairs.spatial[view.across])))
    width = times * pairs.spatial[view.across]
    layout = ipywidgets.Layout(width=f"{width}px", height=f"{round(width * along / across)}px")
    blend = ipywidgets.IntSlider(
        value=BLENDS // 2, max=BLENDS - 1, description="blend", readout=False, layout={"width": "320px"}
    )
    leaf = ipywidgets.IntSlider(
        value=len(places) // 2,
        max=len(places) - 1,
        description="slice",
        readout=False,
        layout={"width": "320px"},
    )
    slices = []
    for position in places:
        flat = classes.take(position, view.depth)
        flat = flat if view.across < view.along else flat.T
        pictures = [
            ipywidgets.Image(value=_blended_png(flat, step / (BLENDS - 1), view.upward, times), layout=layout)
            for step in range(BLENDS)
        ]
        stack = ipywidgets.Stack(pictures, selected_index=blend.value)
        ipywidgets.jslink((blend, "value"), (stack, "selected_index"))
        slices.append(ipywidgets.VBox([stack, ipywidgets.Label(slice_place(pairs, plane, position))]))
    pages = ipywidgets.Stack(slices, selected_index=leaf.value)
    ipywidgets.jslink((leaf, "value"), (pages, "selected_index"))
    left, right, top, bottom = (ipywidgets.HTML(f"<b>{letter}</b>") for letter in view.letters)
    middle = ipywidgets.HBox([left, pages, right], layout={"align_items": "center"})
    view_box = ipywidgets.VBox([top, middle, bottom], layout={"align_items": "center"})
    last = "moving" if displacement is None else "warped"
    ends = ipywidgets.HBox([blend, ipywidgets.Label(f"from fixed to {last}; dark where both have a vessel")])
    return ipywidgets.VBox([leaf, ends, view_box], layout={"align_items": "flex-start"})


def _blended_png(classes: np.ndarray, share: float, upward: bool, times: int) -> bytes:
    """Classes (across, along) as a PNG of four colours: fixed at a strength of 1 - share, moving at ``share``."""
    strength = np.array([0.0, min(1.0, 2 * (1 - share)), min(1.0, 2 * share), 1.0])
    colours = 1 - strength[:, None] * (1 - CLASSES)
    if share in (0.0, 1.0):  # one image alone: what both have looks like what it has
        colours[3] = CLASSES[1] if share == 0 else CLASSES[2]
    image = Image.fromarray(np.ascontiguousarray(classes.T[:: -1 if upward else 1], np.uint8))
    image.putpalette((255 * colours).round().astype(np.uint8).flatten().tolist())
    image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, bits=2)
    return out.getvalue()
