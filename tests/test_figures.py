"""What the figures show: positions, colours, sides, millimetres. How they look is for people to judge."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from ipywidgets.embed import embed_data
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from nbclient import NotebookClient
from PIL import Image

import pairdiff_figures as figures
from pairdiff_core import fields, metrics
from pairdiff_core.pairs import PairSet
from pairdiff_figures import animations, slices, style, volumes
from pairdiff_figures.style import FIXED, LINES, MASKED, METHODS, MOVING, STRUCTURES, VERMILION

NAMES = ("Unknown", "Left-Thalamus", "Right-Thalamus", "Brain-Stem", "something else")
SPATIAL, SPACING = (20, 12, 16), (2.0, 3.0, 1.0)
STEP = (3, 0, 2)  # voxels from fixed to moving in the first volume pair


def blocks(spacing: tuple[float, float] = (2.0, 1.0)) -> PairSet:
    """Two pairs on a 40 x 30 grid: the left thalamus at high, the right at low indices of axis 0.

    In the first pair, moving is shifted by 3 voxels along axis 0, in the second by -3 voxels.
    """
    fixed = torch.zeros(40, 30, dtype=torch.uint8)
    fixed[22:32, 5:15], fixed[8:18, 5:15], fixed[15:25, 18:26] = 1, 2, 3
    pair = torch.stack([fixed, fixed.roll(3, 0)])
    return PairSet(torch.stack([pair, pair.flip(0)]), NAMES, spacing, ("a~b", "b~a"))


def vessels() -> PairSet:
    """Two pairs of a bent vessel; moving is shifted by STEP voxels in the first, and equal to fixed in the second."""
    fixed = torch.zeros(SPATIAL, dtype=torch.uint8)
    fixed[4:8, 3:5, 4:10], fixed[4:14, 3:5, 4:6], fixed[10:12, 3:9, 4:6] = 1, 1, 1
    labels = torch.stack([torch.stack([fixed, fixed.roll(STEP, (0, 1, 2))]), torch.stack([fixed, fixed])])
    points = torch.tensor([[5.0, 3.0, 5.0], [12.0, 4.0, 4.0], [10.0, 7.0, 5.0]])
    landmarks = (torch.stack([points, points + torch.tensor(STEP)], 1), torch.empty(0, 2, 3))
    return PairSet(labels, ("Background", "Vessel"), SPACING, ("a_1~a_2", "b_1~b_2"), landmarks=landmarks)


def truth() -> torch.Tensor:
    """Displacement of the first volume pair, (3, *SPATIAL)."""
    return torch.tensor(STEP, dtype=torch.float32).reshape(3, 1, 1, 1).expand(3, *SPATIAL).clone()


def dot(*position: int) -> torch.Tensor:
    volume = torch.zeros(SPATIAL, dtype=torch.uint8)
    volume[position] = 1
    return volume


@pytest.fixture
def ax() -> Axes:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def letters(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(owner: Figure | Axes) -> list[str]:
    found = owner.legends if isinstance(owner, Figure) else [owner.get_legend()]
    return [text.get_text() for one in found for text in one.get_texts()]


def shown(ax: Axes) -> np.ndarray:
    """The image on an Axes as (across, along, RGB)."""
    return np.asarray(ax.images[0].get_array()).swapaxes(0, 1)


def frame_colours(figure: Figure) -> list[str]:
    return [to_hex(ax.spines["left"].get_edgecolor()).upper() for ax in figure.axes]


def frames_of(page: str) -> list[np.ndarray]:
    found = re.findall(r'"data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")).astype(int) for one in found]


def share(frame: np.ndarray, colour: str, tolerance: int) -> float:
    """The share of pixels of about this colour."""
    return (np.abs(frame - 255 * np.array(to_rgb(colour))).max(-1) < tolerance).mean()


# ---- style


def test_style_is_readable() -> None:
    with plt.rc_context():
        figures.use_style()
        assert min(plt.rcParams[size] for size in ("font.size", "xtick.labelsize", "legend.fontsize")) >= 10


def test_left_and_right_share_a_colour_and_unknown_names_get_one() -> None:
    colours = style.structure_colours(blocks())
    assert (colours[0] == 1).all() and (colours[1] == colours[2]).all()
    assert len({tuple(colour) for colour in colours}) == 4
    own = replace(blocks(), label_colours=((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (255, 0, 51)))
    assert style.structure_colours(own)[4].tolist() == [1.0, 0.0, 0.2]
    assert (style.structure_colours(own)[:4] == colours[:4]).all()


RESULTS = Path(__file__).parents[1] / "book/results"


@pytest.mark.parametrize("file", ["brain2d", "lung250m"])
def test_measured_methods_look_the_same_in_every_figure_and_differ_from_each_other(file: str) -> None:
    names = [row["method"] for row in json.loads((RESULTS / f"{file}.json").read_text())["registration"]]
    together = style.method_styles([*names, "a reader's own"])
    assert all(figures.method_styles([name]) == {name: together[name]} for name in names)
    assert len({tuple(map(str, look.values())) for look in together.values()}) == len(together)
    own = [look["color"] for name, look in together.items() if "instance" not in name and "full size" not in name]
    assert len(set(own)) == len(own) and not {FIXED, MOVING} & {colour.upper() for colour in own}


def test_samplers_look_the_same_in_every_figure() -> None:
    few = set(json.loads((RESULTS / "continuous.json").read_text())["few_steps"]) - {"unseen people"}
    assert few <= set(style.NAMED)
    students = [f"student, {name}" for name in ("reverse KL", "forward KL", "Jensen-Shannon")]
    for methods in (few, ["DDIM", "rectified flow", "GAN", *students]):
        colours = [look["color"] for look in figures.method_styles(methods).values()]
        assert len(set(colours)) == len(colours)


def test_after_instance_optimisation_a_network_keeps_its_colour_with_an_open_marker() -> None:
    looks = style.method_styles(["mine + instance", "real", "mine", "real + instance"])
    for network in ("mine", "real"):
        alone, better = looks[network], looks[f"{network} + instance"]
        assert alone["color"] == better["color"] and alone["marker"] == better["marker"]
        assert (alone["linestyle"], better["linestyle"], better["markerfacecolor"]) == ("-", "--", "white")
    assert looks["mine"]["color"] != looks["real"]["color"]
    assert len(style.method_styles([*style.NAMED, *map(str, range(20))])) == len(style.NAMED) + 20


@pytest.mark.parametrize("asked", ["", "1"])
def test_retina_is_for_notebooks_that_ask_for_it(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRDIFF_RETINA", asked)
    code = "import matplotlib.pyplot as plt\nimport pairdiff_figures as figures\nfigures.use_style()\nplt.plot([1]);"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    (output,) = NotebookClient(notebook, kernel_name="python3").execute().cells[0].outputs
    width = plt.imread(io.BytesIO(base64.b64decode(output.data["image/png"]))).shape[1]
    shown = output.metadata.get("image/png", {}).get("width", width)
    assert width // shown == (2 if asked else 1)


@pytest.mark.parametrize("make", [lambda: figures.pair_figure(blocks()), lambda: figures.volume_pair_figure(vessels())])
def test_a_returned_figure_is_shown_once(make: object) -> None:
    before = plt.get_fignums()
    assert isinstance(make(), Figure)
    assert plt.get_fignums() == before


# ---- slices


def test_axis_0_runs_right_and_axis_1_down(ax: Axes) -> None:
    image = torch.zeros(4, 6, dtype=torch.uint8)
    image[3, 1] = 3
    figures.show_labels(ax, image, blocks())
    assert to_hex(shown(ax)[3, 1]).upper() == STRUCTURES["Brain-Stem"]
    assert (shown(ax)[image.numpy() == 0] == 1).all()
    assert ax.get_xlim() == (-0.5, 3.5) and ax.get_ylim() == (5.5, -0.5)
    assert ax.get_aspect() == 0.5  # a voxel is 2 mm across and 1 mm down


def test_scale_bar_is_as_long_as_its_label_and_sides_come_from_the_names(ax: Axes) -> None:
    pairs = blocks(spacing=(2.0, 2.0))
    figures.show_labels(ax, pairs.fixed[0], pairs, marks=True)
    left, right = ax.lines[0].get_xdata()  # of the Axes, which is 80 mm wide
    assert letters(ax) == ["R", "L", "20 mm"] and 80 * (right - left) == pytest.approx(20)
    ax.clear()
    figures.show_labels(ax, pairs.fixed[0].flip(0), pairs, marks=True)
    assert letters(ax)[:2] == ["L", "R"]


def test_overlap_has_blue_and_orange_outlines_at_the_edges(ax: Axes) -> None:
    fixed, moving = torch.zeros(2, 9, 9, dtype=torch.uint8)
    fixed[2:5, 3:7], moving[4:9, 3:7] = 1, 1
    figures.show_overlap(ax, fixed, moving, blocks())
    outlines = {to_hex(c.get_edgecolor()[0]).upper(): c.get_paths()[0].vertices for c in ax.collections}
    assert set(outlines) == {FIXED, MOVING}
    assert outlines[FIXED].min(0).tolist() == [1.5, 2.5] and outlines[FIXED].max(0).tolist() == [4.5, 6.5]
    assert outlines[MOVING][:, 0].max() == 8.5  # closed where the image ends
    assert ((shown(ax) < 1).all(-1) == ((fixed == moving) & (fixed > 0)).numpy()).all()


def test_grid_lines_lie_at_x_plus_u(ax: Axes) -> None:
    u = torch.zeros(2, 40, 30)
    u[0], u[1] = 1.5, -0.5
    figures.show_grid(ax, u, blocks())
    first = ax.collections[0].get_segments()[0]
    assert np.allclose(first[[0, -1]] - np.array([1.5, -0.5]), [[0, 0], [0, 29]])
    assert len(ax.collections) == 1  # nothing folds


def test_grid_marks_folds(ax: Axes) -> None:
    u = torch.zeros(2, 40, 30)
    u[0, 10], u[0, 12] = 1.5, -1.5  # folds along the whole line between
    figures.show_grid(ax, u, blocks())
    folds = ax.collections[1].get_offsets()
    assert (folds[:, 0] == 11).all() and len(folds) == 30
    assert ax.get_xlim() == (-0.5, 39.5)


def test_each_code_has_one_colour_of_its_own_and_masked_tokens_are_grey(ax: Axes) -> None:
    figures.show_tokens(ax, torch.tensor([[0, 5, 9], [5, 9, 7]]), mask_token=9)
    assert (shown(ax)[0, 1] == shown(ax)[1, 0]).all()
    assert to_hex(shown(ax)[0, 2]).upper() == to_hex(shown(ax)[1, 1]).upper() == MASKED
    ax.clear()
    figures.show_tokens(ax, torch.arange(1024).reshape(32, 32))
    assert len(np.unique(shown(ax).reshape(-1, 3).round(6), axis=0)) == 1024


@pytest.mark.parametrize("draw", [slices.show_labels, slices.show_grid])
def test_slices_refuse_volumes(ax: Axes, draw: object) -> None:
    shape = (4, 5, 6) if draw is slices.show_labels else (3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"not a grid of shape \(4, 5, 6\): take one slice"):
        draw(ax, torch.zeros(shape, dtype=torch.long if len(shape) == 3 else None), blocks())


def test_pair_figure() -> None:
    figure = figures.pair_figure(blocks()[1])
    assert titles(figure) == ["fixed", "moving", "outlines of both"]
    assert legend(figure) == ["Thalamus", "Brain Stem"]
    assert frame_colours(figure)[:2] == [FIXED, MOVING]
    assert (shown(figure.axes[0]) == style.structure_colours(blocks())[blocks().fixed[1].numpy()]).all()


def test_pairs_figure() -> None:
    figure = figures.pairs_figure({"real": blocks(), "synthetic": blocks()[:1]})
    visible = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_ylabel() for ax in visible] == ["real", "", "synthetic", ""]
    assert len([ax for ax in figures.pairs_figure(blocks()).axes if ax.get_visible()]) == 4


def test_registration_figure_warps_moving_to_fixed() -> None:
    u = torch.zeros(2, 2, 40, 30)
    u[0, 0], u[1, 0] = 3.0, -3.0
    for index in (0, 1):
        figure = figures.registration_figure(blocks(), u, index)
        assert titles(figure)[2] == "moving, warped"
        assert (shown(figure.axes[0]) == shown(figure.axes[2])).all()


def test_jacobian_figure_shows_area_on_a_logarithmic_scale_and_folds() -> None:
    grid = fields.identity_grid((40, 30))[None]
    twice = torch.stack([grid[:, 0], 0 * grid[:, 1]], 1).expand(2, -1, -1, -1)  # x + u(x) doubles lengths along axis 0
    figure = figures.jacobian_figure(blocks(), {"stretched": twice, "folded": -2 * twice})
    assert titles(figure)[:2] == ["stretched", "folded"]
    areas, folded = (ax.images[0].get_array() for ax in figure.axes[:2])
    assert to_hex(figure.axes[0].images[0].get_cmap().get_bad()) == "#000000"
    assert areas.min() == areas.max() == 1 and np.ma.getmaskarray(np.ma.masked_invalid(folded)).all()
    assert [tick.get_text() for tick in figure.axes[-1].get_yticklabels()] == ["1/4", "1/2", "1", "2", "4"]


def test_jacobian_figure_of_volumes_shows_the_middle_coronal_slice() -> None:
    across = torch.zeros(2, 3, *SPATIAL)
    across[:, 1] = torch.arange(12.0)[None, :, None]  # doubles lengths along axis 1, which the slice cannot show
    figure = figures.jacobian_figure(vessels(), {"stretched": across})
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (16, 20) and (shown == 1).all()
    assert figure.axes[0].get_ylim() == (-0.5, 15.5) and letters(figure.axes[0])[:4] == list("RLHF")
    assert figure.get_suptitle() == "coronal, 20 mm from the front"
    assert figure.axes[-1].get_ylabel() == "volume in moving / volume in fixed"


def test_error_maps_have_one_scale_in_millimetres() -> None:
    small = torch.zeros(40, 30)
    small[39, 0] = 2.0
    figure = figures.error_maps_figure({"a": small, "b": 3 * small}, blocks())
    a, b = (ax.images[0] for ax in figure.axes[:2])
    assert a.get_array()[0, 39] == 2 and a.get_clim() == b.get_clim() == (0, 6)
    assert titles(figure)[:2] == ["a", "b"] and letters(figure.axes[0])[:2] == ["R", "L"]
    assert "mm" in figure.axes[-1].get_ylabel()


def test_error_maps_of_volumes_show_the_largest_from_front_to_back() -> None:
    errors = torch.full(SPATIAL, torch.nan)
    errors[3, 4, 15], errors[3, 9, 15] = 5.0, 7.0
    for lengths in (errors, errors.nan_to_num(0).amax(1)):
        (ax, _) = figures.error_maps_figure({"a": lengths}, vessels()).axes
        assert ax.images[0].get_array()[15, 3] == 7 and ax.images[0].get_clim() == (0, 7)
        assert ax.get_ylim() == (-0.5, 15.5) and ax.get_aspect() == 0.5


def test_gallery_of_label_maps_shows_all_in_their_order() -> None:
    pairs = blocks()
    figure = figures.labels_gallery_figure(pairs.labels.flatten(0, 1)[:3], pairs, columns=2)
    for ax, image in zip(figure.axes[:3], pairs.labels.flatten(0, 1), strict=False):
        assert (shown(ax) == style.structure_colours(pairs)[image.numpy()]).all()
    assert not figure.axes[3].axison and letters(figure.axes[0])[:2] == ["R", "L"] and not letters(figure.axes[1])
    assert legend(figure) == ["Thalamus", "Brain Stem"]


def test_folds_are_not_marked_in_a_colour_like_that_of_the_moving_image() -> None:
    u = torch.zeros(2, 2, 40, 30)
    u[:, 0] = -2.0 * torch.arange(40.0)[:, None]
    grid = figures.registration_figure(blocks(), u).axes[5]
    assert to_hex(grid.collections[1].get_facecolor()[0]).upper() not in (VERMILION, MOVING)


@pytest.mark.parametrize("spatial", [(80, 96), (160, 192)])
def test_millimetres_are_equally_long_in_figures_of_real_size(spatial: tuple[int, int]) -> None:
    figure = figures.registration_figure(blocks((1.0, 1.0)).resized(spatial), torch.zeros(2, 2, *spatial))
    figure.savefig(io.BytesIO())  # lays the figure out
    sizes = [ax.get_window_extent() for ax in figure.axes]
    assert all(size.width / size.height == pytest.approx(40 / 30, rel=0.02) for size in sizes)


# ---- volumes


@pytest.mark.parametrize("plane", volumes.PLANES)
def test_sides_are_where_the_letters_are(ax: Axes, plane: str) -> None:
    """A dot at the patient's right, front or feet (low indices) is next to R, A or F."""
    ends = {"R": (0, 0), "L": (0, 1), "A": (1, 0), "P": (1, 1), "F": (2, 0), "H": (2, 1)}  # axis; low or high
    figures.show_projection(ax, dot(1, 1, 1), None, vessels(), plane)
    at = {text.get_text(): np.array(text.get_position()) for text in ax.texts if len(text.get_text()) == 1}
    assert len(at) == 4
    ((column, row),) = np.argwhere((shown(ax) != 1).any(2))
    where = ax.transAxes.inverted().transform(ax.transData.transform((column, row)))  # 0 to 1 on the Axes
    for letter, position in at.items():
        axis, high = ends[letter]
        near = np.linalg.norm((where - position) * (position != 0.5)) < 0.35
        assert near != bool(high), letter
        assert axis != volumes.PLANES[plane].depth


@pytest.mark.parametrize("plane", volumes.PLANES)
def test_a_millimetre_is_as_long_across_as_down(ax: Axes, plane: str) -> None:
    view = volumes.PLANES[plane]
    figures.show_projection(ax, *vessels().labels[0], vessels(), plane)
    assert ax.get_aspect() == SPACING[view.along] / SPACING[view.across]
    left, right = ax.lines[0].get_xdata()
    length = int(next(text for text in letters(ax) if "mm" in text).removesuffix(" mm"))
    assert (right - left) * SPATIAL[view.across] * SPACING[view.across] == pytest.approx(length)


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
        found, strength = volumes.project(volumes.classes(dot(*fixed), dot(*moving)), plane)
        assert found[pixel] == expected
        assert (found > 0).sum() == (strength > 0).sum() == 1
    alone = [volumes.project(volumes.classes(dot(*position), None), plane)[1][pixel] for position in (near, far)]
    assert 1 > alone[0] > alone[1] > volumes.FAR


def test_both_means_near_each_other_in_depth() -> None:
    def found(apart: int, mm: float) -> int:
        both = volumes.classes(dot(5, 2, 7), dot(5, 2 + apart, 7))
        return int(volumes.project(both, "coronal", (1.0, mm, 1.0))[0][5, 7])

    assert [found(apart, 1.0) for apart in (0, 2, 3)] == [3, 3, 1]
    assert [found(apart, 4.0) for apart in (0, 1, 2)] == [3, 3, 1]  # one voxel, however large


def test_a_slab_lies_where_the_fixed_image_has_the_most_vessel() -> None:
    labels = torch.zeros(SPATIAL, dtype=torch.uint8)
    labels[3:9, 6, 3], labels[12, 1, 12] = 1, 1
    other = torch.zeros(SPATIAL, dtype=torch.uint8)
    other[:, 1] = 1
    for images in ((labels, None), (None, labels), (labels, other)):
        both = volumes.classes(*images)
        whole, slab = (volumes.project(both, "coronal", SPACING, mm)[0] for mm in (None, 9.0))
        assert whole[12, 12] > 0 and slab[12, 12] == 0
        assert (slab[3:9, 3] > 0).all()


def test_projection_colours(ax: Axes) -> None:
    figures.show_projection(ax, vessels().fixed[0], None, vessels(), "coronal")
    seen = (vessels().fixed[0] > 0).any(1).numpy()
    assert (shown(ax)[~seen] == 1).all()
    tint = (1 - shown(ax)[seen]) / (1 - np.array(to_rgb(FIXED)))
    assert np.allclose(tint, tint[:, :1]) and (tint > volumes.FAR).all()


def test_slice_colours(ax: Axes) -> None:
    fixed, moving = vessels().labels[0]
    volumes.show_slice(ax, volumes.classes(fixed, moving), vessels(), 4, "")
    a, b = (image[:, 4].numpy() > 0 for image in (fixed, moving))
    for colour, where in {"white": ~a & ~b, FIXED: a & ~b, MOVING: b & ~a, LINES: a & b}.items():
        assert where.any()
        assert np.allclose(shown(ax)[where], to_rgb(colour))


def test_volumes_refuse_slices(ax: Axes) -> None:
    with pytest.raises(ValueError, match=r"not a grid of shape \(4, 5\)"):
        figures.show_projection(ax, torch.zeros(4, 5, dtype=torch.uint8), None, vessels(), "coronal")


def test_volume_pair_figure() -> None:
    figure = figures.volume_pair_figure(vessels())
    assert titles(figure) == ["fixed", "moving", "both"]
    assert frame_colours(figure)[:2] == [FIXED, MOVING]
    assert legend(figure) == ["fixed only", "moving only", "both"]


def test_projections_before_and_after() -> None:
    figure = figures.projections_figure(vessels(), 0, truth())
    assert titles(figure) == [*volumes.PLANES, "", "", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["before", "after"]
    before, after = (int((np.ptp(shown(figure.axes[i]), axis=2) > 1e-6).sum()) for i in (0, 3))  # not grey
    assert before > 0 and after == 0
    assert len(figures.projections_figure(vessels()).axes) == 3


def test_displacement_figure_moves_the_grid_and_measures_millimetres() -> None:
    figure = figures.displacement_figure(vessels(), truth())
    assert titles(figure)[:3] == ["fixed", "its grid in moving", "how far it moves"]
    (lines,) = figure.axes[1].collections  # nothing folds
    assert np.allclose(lines.get_segments()[0] - np.array([3, 2]), [(0, i) for i in range(16)])
    assert len(lines.get_segments()) == 20 + 16
    assert np.allclose(figure.axes[2].images[0].get_array(), np.hypot(6, 2))
    assert figure.get_suptitle() == "coronal, 20 mm from the front"


def test_displacement_figure_marks_folds_across_the_plane_too() -> None:
    u = torch.zeros(3, *SPATIAL)
    u[1] = -2.0 * torch.arange(12.0)[None, :, None]  # reverses axis 1, which a coronal slice cannot show
    figure = figures.displacement_figure(vessels(), u)
    assert len(figure.axes[1].collections[1].get_offsets()) == 20 * 16


def test_landmark_figure_draws_arrows_to_the_corresponding_landmarks() -> None:
    figure = figures.landmark_figure(vessels())
    for ax, axes in zip(figure.axes, ([0, 2], [1, 2]), strict=False):
        (arrows,) = ax.collections
        assert np.allclose(sorted(arrows.XY.tolist()), sorted(vessels().landmarks[0][:, 0, axes].tolist()))
        assert np.allclose(np.stack([arrows.U, arrows.V], 1), np.array(STEP)[axes])
        assert np.allclose(arrows.get_array(), np.hypot(6, 2))  # in 3D, in mm
        assert arrows.norm.vmax == pytest.approx(np.hypot(6, 2))
        assert arrows.scale == 1 and arrows.angles == arrows.scale_units == "xy"


def test_landmark_figure_draws_a_displacement_and_its_residual() -> None:
    u = truth() / 3
    drawn = [figures.landmark_figure(vessels(), 0, u, residual).axes[0].collections[0] for residual in (False, True)]
    for arrows, part in zip(drawn, (1 / 3, 2 / 3), strict=True):
        assert np.allclose(arrows.get_array(), part * np.hypot(6, 2))
        assert arrows.norm.vmax == pytest.approx(np.hypot(6, 2))
    assert np.allclose(np.sort(drawn[1].XY[:, 0]) - np.sort(drawn[0].XY[:, 0]), 1)


def test_landmarks_are_thinned_out_or_missing() -> None:
    points = torch.rand(3000, 2, 3) * 10
    figure = figures.landmark_figure(replace(vessels(), landmarks=(points, points)))
    assert 0 < len(figure.axes[0].collections[0].U) <= volumes.ARROWS
    with pytest.raises(ValueError, match="b_1~b_2 has no landmarks"):
        figures.landmark_figure(vessels(), 1)


@pytest.mark.parametrize("make", [figures.projections_figure, figures.landmark_figure])
def test_panels_of_a_figure_have_one_scale(make: object) -> None:
    figure = make(vessels())
    figure.savefig(io.BytesIO())  # lays the figure out
    scales = []
    for ax in (ax for ax in figure.axes if ax.get_title()):
        view, size = volumes.PLANES[ax.get_title()], ax.get_window_extent()
        scales += [size.width / (SPATIAL[view.across] * SPACING[view.across])]
        scales += [size.height / (SPATIAL[view.along] * SPACING[view.along])]
    assert len(scales) >= 4 and max(scales) / min(scales) < 1.03


def test_slices_are_those_with_vessels() -> None:
    pairs = vessels()
    assert animations.slices_with_vessels(pairs, 0, 99) == [3, 4, 5, 6, 7, 8]
    assert animations.slices_with_vessels(pairs, 0, 3) == [3, 6, 8]
    speck = pairs.labels.clone()
    speck[0, :, 0, 0, 0], speck[0, :, :, 5] = 1, 1  # the first is less than a twentieth of the second
    assert animations.slices_with_vessels(replace(pairs, labels=speck), 0, 99)[0] > 0
    empty = replace(pairs, labels=torch.zeros_like(pairs.labels))
    assert animations.slices_with_vessels(empty, 0, 3) == [0, 6, 11]


# ---- curves


def test_training_curve_has_a_panel_for_each_quantity() -> None:
    figure = figures.training_curve([{"step": 10 * i, "loss": 10.0**-i, "dice": 0.5} for i in range(1, 5)])
    assert titles(figure) == ["loss", "dice"]
    loss, dice = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30, 40]
    assert loss.get_yscale() == "log" and dice.get_yscale() == "linear"
    five = figures.training_curve([{"step": 1, **dict.fromkeys("abcde", 1.0)}])
    assert [ax.get_visible() for ax in five.axes] == [True] * 5 + [False]


def test_dice_figure_averages_sides_and_leaves_out_what_is_absent() -> None:
    dice = torch.tensor([[0.2, 0.4, 0.9, torch.nan], [0.4, 0.8, torch.nan, torch.nan]])
    figure = figures.dice_figure({"before": dice, "real": dice[0]}, NAMES)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["all structures", "Thalamus", "Brain Stem", "something else"]
    before = figure.axes[0].lines[0].get_xdata()
    np.testing.assert_allclose(before, [0.55, 0.45, 0.9, np.nan])  # mean over the pairs of 0.5 and 0.6
    assert legend(figure) == ["before", "real"]


def test_dice_figure_starts_at_the_tenth_below_the_data() -> None:
    (ax,) = figures.dice_figure({"a": torch.tensor([0.43, 0.71]), "b": torch.tensor([0.5, torch.nan])}, "012").axes
    assert ax.get_xlim() == pytest.approx((0.4, 0.8))
    (ax,) = figures.dice_figure({"a": torch.ones(1)}, "01").axes
    assert ax.get_xlim()[1] >= 1 and all(not line.get_clip_on() for line in ax.lines[:1])
    (ax,) = figures.dice_figure({"a": torch.tensor([torch.nan])}, "01").axes
    assert ax.get_xlim() == (0, 1)


def test_mean_interval_shrinks_with_the_root_of_the_number() -> None:
    values = torch.tensor([0.0, 1.0] * 50)
    low, high = figures.mean_interval(values)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.01)
    assert figures.mean_interval(values) == [low, high]
    few = figures.mean_interval(values, 25)
    assert few[1] - few[0] == pytest.approx(2 * (high - low), rel=0.15)


def test_cases_figure_shows_each_case_and_the_interval_of_the_mean() -> None:
    rows = {"real": torch.tensor([1.0, 3.0, 8.0]), "real + instance": torch.tensor([1.0, 2.0])}
    (ax,) = figures.cases_figure(rows, "error, mm", labels={"real": "first"}).axes
    dots, interval, mean = ax.lines[:3]
    assert dots.get_xdata().tolist() == [1, 3, 8] and dots.get_alpha() < 1
    assert list(interval.get_xdata()) == figures.mean_interval(rows["real"])
    assert (list(mean.get_xdata()), mean.get_marker()) == ([4], "D")
    assert {line.get_color().upper() for line in ax.lines} == {METHODS[2][0]}
    assert ax.lines[3].get_markerfacecolor() == "white"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "real + instance"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first method is on top"
    assert ax.get_xlim()[0] == 0 and ax.get_xlabel() == "error, mm"
    assert figures.cases_figure({"real": torch.tensor([0.7, 0.8])}).axes[0].get_xlim()[0] > 0.6


def test_area_figure_is_relative_to_the_real_mean() -> None:
    half = blocks().labels.clone()
    half[:, :, :, 10:15] = 0  # of the thalami
    figure = figures.area_figure(metrics.compare_areas(blocks().labels, half, NAMES))
    real, synthetic = (container.lines[0].get_xdata() for container in figure.axes[0].containers)
    np.testing.assert_allclose(real, [100, 100, 100, np.nan])
    np.testing.assert_allclose(synthetic, [50, 50, 100, np.nan])
    assert legend(figure) == ["real", "synthetic"]


def test_codebook_figure_sorts_and_counts_codes() -> None:
    figure = figures.codebook_figure(torch.tensor([0, 3, 0, 1]))
    assert titles(figure) == ["2 of 4 codes in use"]
    assert figure.axes[0].patches[0].get_data().values.tolist() == [75, 25]  # a logarithmic axis has no zero
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_xlim() == (0, 4)


def test_memorisation_figure_shows_both_sets_in_percent() -> None:
    (ax,) = figures.memorisation_figure(torch.full((4,), 0.1), torch.full((7,), 0.3), 0.2).axes
    assert [sum(bar.get_height() for bar in bars) for bars in ax.containers] == pytest.approx([100, 100])
    assert ax.lines[0].get_xdata() == [0.2, 0.2]


def test_error_curves() -> None:
    errors = {"before": torch.tensor([4.0, 1.0, 3.0, 2.0]), "after": torch.tensor([0.5, 0.5, 1.5])}
    figure = figures.error_curves_figure(errors, labels={"after": "with a network"})
    (ax,) = figure.axes
    before, median, after = ax.lines[:3]
    assert before.get_xdata().tolist()[1:] == [1, 2, 3, 4]
    assert before.get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (median.get_xdata().item(), median.get_ydata().item()) == (2.5, 0.5)
    assert after.get_ydata()[after.get_xdata() <= 0.5].max() == pytest.approx(2 / 3)
    assert legend(figure) == ["before: median 2.5 mm", "with a network: median 0.5 mm"]
    colours = [to_hex(line.get_color()).upper() for line in (before, median, after)]
    assert colours == [METHODS[0][0], METHODS[0][0], METHODS[1][0]]
    assert ax.yaxis.get_major_formatter()(0.5) == "50"


def test_steps() -> None:
    quality = {"a": {1: 0.5, 4: 0.9}, "b": {2: 0.3}}
    figure = figures.steps_figure({"quality": quality, "coverage": quality}, {"coverage": ("real", 0.8)})
    left, right = figure.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 0.5], [4, 0.9]], [[2, 0.3]]]
    assert [line.get_color().upper() for line in right.lines[:2]] == [METHODS[0][0], METHODS[1][0].upper()]
    assert len(right.lines) == 3 and right.lines[2].get_ydata()[0] == 0.8
    assert left.get_xticks().tolist() == right.get_xticks().tolist() == [1, 2, 4]
    assert (left.get_ylabel(), right.get_ylabel()) == ("quality", "coverage")


# ---- animations


@pytest.fixture(scope="module")
def unmasking() -> str:
    states = torch.full((40, 20), 8)
    for step in range(40):
        states[step, : step // 2 + 1] = 3
    return figures.unmasking_animation(states, 8, (5, 4), blocks((1.0, 1.0))[:1]).data


@pytest.fixture(scope="module")
def warping() -> str:
    u = torch.zeros(2, 2, 40, 30)
    u[:, 0] = 3.0
    return figures.warp_animation(blocks((1.0, 1.0)), u).data


@pytest.fixture(scope="module")
def browsing() -> str:
    return figures.slices_animation(vessels(), 0, truth()).data


def test_players_need_nothing_from_elsewhere_and_do_not_clash(unmasking: str, warping: str, browsing: str) -> None:
    ids = []
    for page in (unmasking, warping, browsing):
        assert not re.search(r"<link|https?:|//[a-z]+\.|class=\"fa", page)
        buttons = re.findall(r'<button title="([^"]*)"[^>]*>\s*(.*?)\s*</button>', page, re.DOTALL)
        assert [title for title, _ in buttons][::4] == ["Decrease speed", "Pause", "Increase speed"]
        assert [symbol for _, symbol in buttons][::4] == ["&minus;", "||", "+"]
        assert len(buttons) == 9 and all(symbol and "<" not in symbol for _, symbol in buttons)
        alt = re.search('<img [^>]*alt="([^"]+)"', page)[1]
        assert f'type="range" aria-label="Frame: {alt}"' in page
        assert page.count('<button title="') == len(re.findall('<button title="([^"]+)" aria-label="\\1"', page))
        assert len(page) < 250_000
        ids += set(re.findall(r'id="([^"]+)"', page))
    assert len(ids) == len(set(ids)) > 0


def test_unmasking_uncovers(unmasking: str) -> None:
    frames = frames_of(unmasking)
    assert len(frames) == animations.FRAMES
    covered = [share(frame, MASKED, 4) for frame in frames]
    assert covered[0] > 0.5 and covered[-1] < 0.02
    assert all(later <= earlier + 1e-3 for earlier, later in zip(covered, covered[1:], strict=False))


def test_players_wait_at_a_telling_frame(warping: str) -> None:
    assert ".set_frame(5);" in warping  # of 11: half-way


def test_texts_of_a_player_are_escaped() -> None:
    figure, [[ax]] = figures.closed_figure(1, 1, (1, 1))
    page = figures.player(figure, lambda frame: ax.set_title(str(frame)), 2, 'a "b" < c').data
    assert page.count("a &quot;b&quot; &lt; c") == 2


def test_warping_ends_at_the_fixed_image(warping: str) -> None:
    first, *_, last = (frame[: int(0.85 * len(frame)), frame.shape[1] // 2 + 5 :] for frame in frames_of(warping))
    assert share(first, FIXED, 60) > 0 and share(first, MOVING, 60) > 0  # the outlines, without the legend
    assert share(last, FIXED, 60) < 0.1 * share(first, FIXED, 60)  # the orange outline lies on the blue one


def test_player_goes_through_the_slices_before_and_after(browsing: str) -> None:
    frames = frames_of(browsing)
    assert len(frames) == 6
    for frame in frames:
        before, after = np.split(frame[:, : frame.shape[1] // 2 * 2], 2, axis=1)
        assert share(before, MOVING, 40) > share(after, MOVING, 40)  # only the legend remains


def test_rotation_turns_an_image_once() -> None:
    """A ball at one side is in the middle after a quarter turn, and at the other side after half a turn."""
    from_centre = fields.identity_grid((24, 16, 20)) - torch.tensor([4.0, 7.5, 9.5]).reshape(3, 1, 1, 1)
    ball = (from_centre.norm(dim=0) < 3).byte()
    page = figures.rotation_animation({"ball": ball}, 2.0).data
    assert f".set_frame({animations.TURNS // 10});" in page
    frames = frames_of(page)
    assert len(frames) == animations.TURNS
    dark = [frame.min(2)[40:-20, 20:-20] < 240 for frame in frames]  # without title and frame
    columns = [np.nonzero(where)[1].mean() / where.shape[1] for where in dark]
    first, quarter, half = (columns[animations.TURNS * part // 4] for part in (0, 1, 2))
    assert abs(quarter - 0.5) < 0.05 and abs(first + half - 1) < 0.05 and abs(first - 0.5) > 0.25


@pytest.fixture
def widget() -> ipywidgets.VBox:
    return figures.slices_widget(vessels(), 0, truth() / 2)


def sliders_and_pages(widget: ipywidgets.VBox) -> tuple[ipywidgets.Widget, ...]:
    leaf, ends, view = widget.children
    return leaf, ends.children[0], view.children[1].children[1]


def picture(widget: ipywidgets.VBox, page: int, blend: int) -> np.ndarray:
    stack = sliders_and_pages(widget)[2].children[page].children[0]
    return np.asarray(Image.open(io.BytesIO(stack.children[blend].value)).convert("RGB"))


def test_widget_blends_from_fixed_to_warped(widget: ipywidgets.VBox) -> None:
    leaf, blend, pages = sliders_and_pages(widget)
    assert leaf.max + 1 == len(pages.children) == 6
    assert blend.max + 1 == len(pages.children[0].children[0].children) == animations.BLENDS
    ends = {0: {FIXED}, animations.BLENDS // 2: {FIXED, MOVING, LINES}, animations.BLENDS - 1: {MOVING}}
    for step, colours in ends.items():
        found = {tuple(rgb) for rgb in picture(widget, 0, step).reshape(-1, 3)}
        assert {to_hex(np.array(rgb) / 255).upper() for rgb in found} == {"#FFFFFF", *colours}


def test_widget_shows_the_slice_with_the_head_up(widget: ipywidgets.VBox) -> None:
    image = picture(widget, 0, 0)
    times = image.shape[1] // SPATIAL[0]
    fixed = (image[::times, ::times] != 255).any(2)[::-1].T  # (across, along) again
    assert (fixed == (vessels().fixed[0][:, 3] > 0).numpy()).all()


def test_widget_works_without_a_kernel(widget: ipywidgets.VBox) -> None:
    """Both sliders are linked in the browser, so the saved state is all that a static page needs."""
    state = embed_data([widget])["manager_state"]["state"].values()
    links = [model["state"] for model in state if model["model_name"] == "LinkModel"]
    ends = {tuple(link[end][0].removeprefix("IPY_MODEL_") for end in ("source", "target")) for link in links}
    leaf, blend, pages = sliders_and_pages(widget)
    assert (leaf.model_id, pages.model_id) in ends
    assert {(blend.model_id, page.children[0].model_id) for page in pages.children} < ends
    assert pages.selected_index == leaf.value


def test_widget_of_real_size_is_small() -> None:
    large = torch.zeros(1, 2, 128, 104, 128, dtype=torch.uint8)
    large[:, :, 20:100:6, 10:90, ::5], large[:, 1] = 1, large[:, 0].roll(2, 3)
    pairs = PairSet(large, ("Background", "Vessel"), (2.0, 2.0, 2.0), ("a~b",))
    assert len(str(embed_data([figures.slices_widget(pairs)]))) < 250_000


def test_grey_images_are_drawn_as_they_are_under_their_names():
    images = torch.rand(2, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    figure = figures.images_figure({"real": images, "synthetic": images[:1]}, (2.0, 2.0), columns=2)
    axes = np.array(figure.axes).reshape(2, 2)
    assert [line[0].get_ylabel() for line in axes] == ["real", "synthetic"]
    shown = axes[0, 1].images[0]
    assert np.array_equal(shown.get_array(), images[1, 0].numpy().T) and shown.get_clim() == (0, 1)
    assert not axes[1, 1].images and not axes[1, 1].axison


def test_the_landscape_shows_each_work_once_below_its_task_and_its_equations():
    works = [
        ("tokens", "pairs", "ours", True),
        ("noise", "pairs", "theirs", False),
        ("noise", "copies", "other", False),
    ]
    (ax,) = figures.landscape_figure([*works, ("noise", "copies", "more", False)]).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["tokens", "noise"]
    at = {text.get_text(): (*text.get_position(), to_hex(text.get_color())) for text in ax.texts}
    assert set(at) == {"pairs", "copies", "ours", "theirs", "other", "more"}
    assert at["ours"][2] == to_hex(style.GREEN) != at["theirs"][2]
    assert int(at["ours"][0]) == 0 and int(at["theirs"][0]) == int(at["other"][0]) == 1
    border = ax.lines[1].get_ydata()[0]  # between the two rows; y points down
    assert max(at["ours"][1], at["theirs"][1]) < border < min(at["other"][1], at["more"][1])
    assert at["other"][1] < at["more"][1], "works of one cell are below each other"


U_SHAPE = (
    [("maps", (8, 40, 48)), ("conv", (8, 40, 48)), ("pool", (16, 20, 24))],
    [("pool", (32, 10, 12))],
    [("up", (16, 20, 24)), ("up", (8, 40, 48)), ("logits", (2, 5, 160, 192))],
)
CHAIN = ([("linear, for $q$, $k$ and $v$", (3, 4, 480, 32)), ("mean", (4, 480, 32)), ("linear", (480, 128))],)


@pytest.mark.parametrize("columns", [U_SHAPE, CHAIN])
def test_an_architecture_shows_each_operation_and_shape_in_its_box(columns: tuple) -> None:
    with plt.rc_context():
        figures.use_style()
        figure = figures.architecture_figure(columns, [(0, 2)])
    (ax,) = figure.axes
    path = [box for column in columns for box in column]
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    figure.savefig(io.BytesIO())  # lays the figure out
    for (operation, shape), text, box in zip(path, ax.texts, boxes, strict=True):
        assert operation in text.get_text() and text.get_text().endswith(" × ".join(map(str, shape)))
        inner, outer = text.get_window_extent(), box.get_window_extent()
        assert outer.x0 < inner.x0 and inner.x1 < outer.x1, "the text is wider than its box"
        assert outer.y0 < inner.y0 and inner.y1 < outer.y1, "the text is higher than its box"
        assert text.get_fontsize() * 3.6 / figure.get_figwidth() >= 8, "too small on a phone"
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    colours = [to_hex(arrow.get_edgecolor()) for arrow in arrows]
    assert colours == [to_hex(LINES)] * (len(path) - 1) + [to_hex(style.PURPLE)]


def test_boxes_of_an_architecture_follow_the_resolution_down_and_up_again() -> None:
    (ax,) = figures.architecture_figure(U_SHAPE, [(1, 5)]).axes
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    heights = torch.tensor([box.get_height() for box in boxes])
    steps = torch.tensor([0.0, -1, -1, 1, 1, 2])  # in powers of two
    torch.testing.assert_close(heights.diff(), steps * (heights[0] - heights[2]))
    middles = torch.tensor([box.get_y() + box.get_height() / 2 for box in boxes])  # y points down
    assert (middles[:4].diff() > 0).all() and (middles[3:].diff() < 0).all()
    assert middles[1] == middles[5], "boxes joined by a skip connection are beside each other"
    across = [round(box.get_x(), 3) for box in boxes]
    assert across == sorted(across) and len(set(across)) == 3
    skip = ax.patches[-1].get_path().vertices
    assert skip[0].tolist() == pytest.approx([boxes[1].get_x() + boxes[1].get_width(), float(middles[1])])
    with pytest.raises(ValueError, match="unpack"):
        figures.architecture_figure(U_SHAPE[:2])
