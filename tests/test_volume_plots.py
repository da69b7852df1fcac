"""What the figures of volumes say: planes, sides, colours, millimetres. What they look like has to be looked at."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from ipywidgets.embed import embed_data
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from test_plots import frames_of, legend_texts, texts

from pairdiff_core import metrics, plots, volume_plots
from pairdiff_core.pairs import PairSet

SPATIAL = (20, 12, 16)
SPACING = (2.0, 3.0, 1.0)
STEP = (3, 0, 2)  # voxels from fixed to moving


def volumes() -> PairSet:
    """Two pairs of a bent vessel; in the first moving lies (3, 0, 2) voxels further on, in the second it is fixed."""
    fixed = torch.zeros(SPATIAL, dtype=torch.uint8)
    fixed[4:8, 3:5, 4:10], fixed[4:14, 3:5, 4:6], fixed[10:12, 3:9, 4:6] = 1, 1, 1
    moving = fixed.roll(STEP, (0, 1, 2))
    fixed_points = torch.tensor([[5.0, 3.0, 5.0], [12.0, 4.0, 4.0], [10.0, 7.0, 5.0]])
    points = torch.stack([fixed_points, fixed_points + torch.tensor(STEP)], 1)
    return PairSet(
        torch.stack([torch.stack([fixed, moving]), torch.stack([fixed, fixed])]),
        ("Background", "Vessel"),
        SPACING,
        ("a_1~a_2", "b_1~b_2"),
        landmarks=(points, torch.empty(0, 2, 3)),
    )


def truth() -> torch.Tensor:
    """Displacement of the first pair, (3, *spatial)."""
    return torch.tensor(STEP, dtype=torch.float32).reshape(3, 1, 1, 1).expand(3, *SPATIAL).clone()


@pytest.fixture
def ax() -> Axes:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def dot(*place: int) -> torch.Tensor:
    volume = torch.zeros(SPATIAL, dtype=torch.uint8)
    volume[place] = 1
    return volume


def on_screen(ax: Axes, place: tuple[float, float]) -> np.ndarray:
    """Where a point in data coordinates is on the Axes: 0 to 1 from the left and from the bottom."""
    return ax.transAxes.inverted().transform(ax.transData.transform(place))


# ---- planes and sides


@pytest.mark.parametrize("plane", volume_plots.PLANES)
def test_sides_are_where_the_letters_are(ax: Axes, plane: str) -> None:
    """A dot at the patient's right, front and feet end (low indices) is next to R, A and F."""
    ends = {"R": (0, 0), "L": (0, 1), "A": (1, 0), "P": (1, 1), "F": (2, 0), "H": (2, 1)}  # axis; low or high
    volume_plots.show_slice(ax, dot(1, 1, 1), None, volumes(), plane, position=1)
    letters = {t.get_text(): np.array(t.get_position()) for t in ax.texts if len(t.get_text()) == 1}
    assert len(letters) == 4
    colours = ax.images[0].get_array()  # (along, across, RGB)
    (row,), (column,) = np.nonzero((colours != 1).any(2))
    place = on_screen(ax, (column, row))
    for letter, where in letters.items():
        axis, high = ends[letter]
        near = np.linalg.norm(place * (where != 0.5) - where * (where != 0.5)) < 0.35
        assert near != bool(high), letter
        assert axis != volume_plots.PLANES[plane].depth


def test_radiological_convention() -> None:
    assert {name: plane.letters for name, plane in volume_plots.PLANES.items()} == {
        "coronal": "RLHF",
        "sagittal": "APHF",
        "axial": "RLAP",
    }


@pytest.mark.parametrize("plane", volume_plots.PLANES)
def test_a_millimetre_is_as_long_across_as_down(ax: Axes, plane: str) -> None:
    pairs, view = volumes(), volume_plots.PLANES[plane]
    volume_plots.show_projection(ax, pairs.fixed[0], pairs.moving[0], pairs, plane)
    assert ax.get_aspect() == SPACING[view.along] / SPACING[view.across]
    left, right = ax.lines[0].get_xdata()
    length = int(next(t.get_text() for t in ax.texts if "mm" in t.get_text()).removesuffix(" mm"))
    assert (right - left) * SPATIAL[view.across] * SPACING[view.across] == pytest.approx(length)


# ---- projections


@pytest.mark.parametrize(
    ("plane", "near", "far", "pixel"),
    [
        ("coronal", (5, 2, 7), (5, 9, 7), (5, 7)),  # from the front
        ("sagittal", (15, 6, 7), (2, 6, 7), (6, 7)),  # from the patient's left
        ("axial", (5, 6, 3), (5, 6, 12), (5, 6)),  # from the feet
    ],
)
def test_the_nearest_vessel_is_seen(
    plane: str, near: tuple[int, ...], far: tuple[int, ...], pixel: tuple[int, int]
) -> None:
    for fixed, moving, expected in ((near, far, 1), (far, near, 2)):
        classes, strength = volume_plots.project(dot(*fixed), dot(*moving), plane)
        assert classes[pixel] == expected
        assert (classes > 0).sum() == (strength > 0).sum() == 1
    alone = [volume_plots.project(dot(*place), None, plane)[1][pixel] for place in (near, far)]
    assert 1 > alone[0] > alone[1] > volume_plots.FAR


def test_both_means_near_each_other_in_depth() -> None:
    def classes(apart: int, mm: float) -> int:
        found, _ = volume_plots.project(dot(5, 2, 7), dot(5, 2 + apart, 7), "coronal", (1.0, mm, 1.0))
        return int(found[5, 7])

    assert [classes(apart, 1.0) for apart in (0, 2, 3)] == [3, 3, 1]
    assert [classes(apart, 4.0) for apart in (0, 1, 2)] == [3, 3, 1]  # one voxel, however large


def test_a_slab_shows_only_what_is_in_it() -> None:
    volume = torch.zeros(SPATIAL, dtype=torch.uint8)
    volume[3:9, 6, 3], volume[12, 1, 12] = 1, 1
    whole, slab = (volume_plots.project(volume, None, "coronal", SPACING, mm)[0] for mm in (None, 9.0))
    assert whole[12, 12] == 1 and slab[12, 12] == 0
    assert (whole[3:9, 3] == 1).all() and (slab[3:9, 3] == 1).all()


def test_projection_colours(ax: Axes) -> None:
    pairs = volumes()
    volume_plots.show_projection(ax, pairs.fixed[0], None, pairs)
    shown = np.asarray(ax.images[0].get_array()).swapaxes(0, 1)  # (across, along, RGB)
    seen = (pairs.fixed[0] > 0).any(1).numpy()
    assert (shown[~seen] == 1).all()
    tint = (1 - shown[seen]) / (1 - np.array(to_rgb(plots.FIXED)))
    assert np.allclose(tint, tint[:, :1]) and (tint > volume_plots.FAR).all()


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        volume_plots.project(None, None, "axial")


@pytest.mark.parametrize("plane", volume_plots.PLANES)
def test_slice_colours(ax: Axes, plane: str) -> None:
    pairs, view = volumes(), volume_plots.PLANES[plane]
    fixed, moving = pairs.fixed[0], pairs.moving[0]
    volume_plots.show_slice(ax, fixed, moving, pairs, plane, 5)
    shown = np.asarray(ax.images[0].get_array()).swapaxes(0, 1)
    a, b = (image.select(view.depth, 5).numpy() > 0 for image in (fixed, moving))
    colours = {"white": ~a & ~b, plots.FIXED: a & ~b, plots.MOVING: b & ~a, volume_plots.BOTH: a & b}
    for colour, where in colours.items():
        assert np.allclose(shown[where], to_rgb(colour))
    assert ax.get_title() == f"{plane}, {5.5 * SPACING[view.depth]:.0f} mm from the {view.origin}"


def test_slices_are_refused(ax: Axes) -> None:
    with pytest.raises(ValueError, match="only volumes"):
        volume_plots.show_slice(ax, torch.zeros(4, 5, dtype=torch.uint8), None, volumes())


# ---- displacements


@pytest.mark.parametrize(
    ("plane", "shift", "size"), [("coronal", (3, 2), (20, 16)), ("sagittal", (0, 2), (12, 16))]
)
def test_grid_lines_lie_at_x_plus_u(
    ax: Axes, plane: str, shift: tuple[int, int], size: tuple[int, int]
) -> None:
    volume_plots.show_volume_grid(ax, truth(), volumes(), plane, 4)
    segments = ax.collections[0].get_segments()
    assert len(ax.collections) == 1  # nothing folds
    assert np.allclose(segments[0] - np.array(shift), [(0, i) for i in range(size[1])])
    assert len(segments) == sum(size)


@pytest.mark.parametrize("position", [0, 6, 11])
def test_grid_marks_folds_across_the_plane_too(ax: Axes, position: int) -> None:
    u = torch.zeros(3, *SPATIAL)
    u[1] = -2.0 * torch.arange(12.0)[None, :, None]  # turns axis 1 round, which a coronal slice cannot show
    volume_plots.show_volume_grid(ax, u, volumes(), "coronal", position)
    assert len(ax.collections[1].get_offsets()) == 20 * 16


def test_displacement_figure_gives_millimetres() -> None:
    figure = volume_plots.displacement_figure(volumes(), truth(), position=4)
    assert texts(figure)[:3] == ["fixed", "fixed grid, taken to moving", "how far it moves"]
    assert np.allclose(figure.axes[2].images[0].get_array(), np.hypot(6, 2))
    assert figure.get_suptitle() == "coronal, 14 mm from the front"


def test_landmark_figure_draws_arrows_to_the_partners() -> None:
    pairs = volumes()
    figure = volume_plots.landmark_figure(pairs)
    for ax, axes in zip(figure.axes, ([0, 2], [1, 2]), strict=False):
        arrows = ax.collections[0]
        assert np.allclose(sorted(arrows.XY.tolist()), sorted(pairs.landmarks[0][:, 0, axes].tolist()))
        assert np.allclose(np.stack([arrows.U, arrows.V], 1), np.array(STEP)[axes])
        assert np.allclose(arrows.get_array(), np.hypot(6, 2))  # in 3D, in mm
        assert arrows.norm.vmax == pytest.approx(np.hypot(6, 2))
        assert arrows.scale == 1 and arrows.angles == arrows.scale_units == "xy"


def test_landmark_figure_draws_a_displacement_and_what_it_leaves() -> None:
    pairs, half = volumes(), truth() / 2
    moved = volume_plots.landmark_figure(pairs, displacement=half).axes[0].collections[0]
    left = volume_plots.landmark_figure(pairs, displacement=half, remaining=True).axes[0].collections[0]
    for arrows in (moved, left):
        assert np.allclose(arrows.get_array(), np.hypot(6, 2) / 2)
        assert arrows.norm.vmax == pytest.approx(np.hypot(6, 2))
    assert np.allclose(np.sort(left.XY[:, 0]) - np.sort(moved.XY[:, 0]), 1.5)


def test_many_landmarks_are_thinned_out() -> None:
    points = torch.rand(3000, 2, 3) * 10
    figure = volume_plots.landmark_figure(replace(volumes(), landmarks=(points, points)))
    assert 0 < len(figure.axes[0].collections[0].U) <= volume_plots.ARROWS


def test_landmark_figure_needs_landmarks() -> None:
    with pytest.raises(ValueError, match="b_1~b_2 has no landmarks"):
        volume_plots.landmark_figure(volumes(), 1)


# ---- finished figures


def test_a_returned_figure_is_shown_once() -> None:
    before = plt.get_fignums()
    assert isinstance(volume_plots.volume_pair_figure(volumes()), Figure)
    assert plt.get_fignums() == before


def test_volume_pair_figure() -> None:
    figure = volume_plots.volume_pair_figure(volumes())
    assert texts(figure) == ["fixed", "moving", "both"]
    frames = [to_hex(ax.spines["left"].get_edgecolor()).upper() for ax in figure.axes]
    assert frames[:2] == [plots.FIXED, plots.MOVING]
    assert legend_texts(figure) == ["fixed only", "moving only", "both"]


def test_projections_before_and_after() -> None:
    pairs = volumes()
    figure = volume_plots.projections_figure(pairs, 0, truth())
    assert texts(figure) == [*volume_plots.PLANES, "", "", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["before", "after"]
    before, after = (np.asarray(figure.axes[i].images[0].get_array()) for i in (0, 3))

    def coloured(picture: np.ndarray) -> int:
        return int((np.ptp(picture, axis=2) > 1e-6).sum())  # grey has no colour

    assert coloured(before) > 0 and coloured(after) == 0
    assert len(volume_plots.projections_figure(pairs).axes) == 3


@pytest.mark.parametrize("make", [volume_plots.projections_figure, volume_plots.landmark_figure])
def test_panels_of_a_figure_have_one_scale(make: object) -> None:
    figure = make(volumes())
    figure.savefig(io.BytesIO())  # lays the figure out
    planes = [volume_plots.PLANES[ax.get_title()] for ax in figure.axes if ax.get_title()]
    scales = []
    for ax, view in zip(figure.axes, planes, strict=False):
        size = ax.get_window_extent()
        scales += [size.width / (SPATIAL[view.across] * SPACING[view.across])]
        scales += [size.height / (SPATIAL[view.along] * SPACING[view.along])]
    assert max(scales) / min(scales) < 1.03


def test_error_curves() -> None:
    errors = {"before": torch.tensor([4.0, 1.0, 3.0, 2.0]), "after": torch.tensor([0.5, 0.5, 1.5])}
    figure = volume_plots.error_curves_figure(errors)
    before, median, after = figure.axes[0].lines[:3]
    assert before.get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert before.get_ydata().tolist() == [0, 25, 50, 75, 100]
    assert (median.get_xdata().item(), median.get_ydata().item()) == (2.5, 50)
    assert after.get_xdata().tolist() == [0, 0.5, 0.5, 1.5]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["before: median 2.5 mm", "after: median 0.5 mm"]
    colours = [to_hex(line.get_color()).upper() for line in (before, median, after)]
    assert colours == [plots.METHODS[0][0], plots.METHODS[0][0], plots.METHODS[1][0]]


def test_error_curves_of_the_metric_and_without_landmarks() -> None:
    pairs = volumes()
    error = metrics.target_registration_error(truth(), pairs.landmarks[0], SPACING)
    assert volume_plots.error_curves_figure({"truth": error}).axes[0].lines[0].get_xdata().max() < 1e-4
    with pytest.raises(ValueError, match="no landmark errors of 'none'"):
        volume_plots.error_curves_figure({"none": torch.empty(0)})


# ---- to leaf through


def test_slices_are_those_with_vessels() -> None:
    pairs = volumes()
    assert volume_plots.slices_with_vessels(pairs, 0, "coronal", 99) == [3, 4, 5, 6, 7, 8]
    assert volume_plots.slices_with_vessels(pairs, 0, "coronal", 3) == [3, 6, 8]
    speck = pairs.labels.clone()
    speck[0, :, 0, 0, 0], speck[0, :, :, 5] = 1, 1  # the first is less than a twentieth of the second
    assert volume_plots.slices_with_vessels(replace(pairs, labels=speck), 0, "coronal", 99)[0] > 0
    empty = replace(pairs, labels=torch.zeros_like(pairs.labels))
    assert volume_plots.slices_with_vessels(empty, 0, "axial", 3) == [8]


def test_player_goes_through_the_slices_and_needs_nothing_from_elsewhere() -> None:
    page = volume_plots.slices_animation(volumes(), 0, truth()).data
    assert not re.search(r"<link|https?:|//[a-z]+\.|class=\"fa", page)
    assert len(page) < 250_000
    frames = frames_of(page)
    assert len(frames) == 6
    colour = np.array([round(255 * part) for part in to_rgb(plots.MOVING)])
    halves = [np.split(frame[:, : frame.shape[1] // 2 * 2], 2, axis=1) for frame in frames]
    orange = [[(np.abs(half - colour).max(-1) < 40).sum() for half in pair] for pair in halves]
    before, after = np.array(orange)[:, 0], np.array(orange)[:, 1]
    assert (before > after).all()  # only the legend is left


@pytest.fixture
def widget() -> ipywidgets.VBox:
    return volume_plots.slices_widget(volumes(), 0, truth() / 2)


def sliders_and_pages(widget: ipywidgets.VBox) -> tuple[ipywidgets.IntSlider, ...]:
    leaf, ends, view = widget.children
    return leaf, ends.children[0], view.children[1].children[1]


def picture(widget: ipywidgets.VBox, page: int, blend: int) -> np.ndarray:
    stack = sliders_and_pages(widget)[2].children[page].children[0]
    return np.asarray(Image.open(io.BytesIO(stack.children[blend].value)).convert("RGB"))


def test_widget_blends_from_fixed_to_warped(widget: ipywidgets.VBox) -> None:
    leaf, blend, pages = sliders_and_pages(widget)
    assert leaf.max + 1 == len(pages.children) == 6
    assert blend.max + 1 == len(pages.children[0].children[0].children) == volume_plots.BLENDS

    def colours(step: int) -> set[str]:
        found = {tuple(rgb) for rgb in picture(widget, 0, step).reshape(-1, 3)}
        return {to_hex(np.array(rgb) / 255).upper() for rgb in found}

    assert colours(0) == {"#FFFFFF", plots.FIXED}
    assert colours(volume_plots.BLENDS // 2) == {"#FFFFFF", plots.FIXED, plots.MOVING, volume_plots.BOTH}
    assert colours(volume_plots.BLENDS - 1) == {"#FFFFFF", plots.MOVING}


def test_widget_shows_the_slice_with_the_head_up(widget: ipywidgets.VBox) -> None:
    shown = picture(widget, 0, 0)
    times = shown.shape[1] // SPATIAL[0]
    fixed = (shown[::times, ::times] != 255).any(2)[::-1].T  # (across, along) again
    assert (fixed == (volumes().fixed[0][:, 3] > 0).numpy()).all()


def test_widget_works_without_a_kernel(widget: ipywidgets.VBox) -> None:
    """Both sliders are linked in the browser, so the saved state is all that a static page needs."""
    state = embed_data([widget])["manager_state"]["state"]
    links = [m["state"] for m in state.values() if m["model_name"] == "LinkModel"]
    leaf, blend, pages = sliders_and_pages(widget)
    ends = {
        tuple(reference.removeprefix("IPY_MODEL_") for reference, _ in (e["source"], e["target"]))
        for e in links
    }
    assert (leaf.model_id, pages.model_id) in ends
    assert {(blend.model_id, page.children[0].model_id) for page in pages.children} < ends
    assert pages.selected_index == leaf.value


def test_widget_of_real_size_is_small() -> None:
    large = torch.zeros(1, 2, 128, 104, 128, dtype=torch.uint8)
    large[:, :, 20:100:6, 10:90, ::5], large[:, 1] = 1, large[:, 0].roll(2, 3)
    pairs = PairSet(large, ("Background", "Vessel"), (2.0, 2.0, 2.0), ("a~b",))
    state = embed_data([volume_plots.slices_widget(pairs)])
    assert len(str(state)) < 250_000
