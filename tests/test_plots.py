"""What the figures say: places, colours, sides, scales. What they look like has to be looked at."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from pairdiff_core import metrics, plots
from pairdiff_core.pairs import PairSet

NAMES = ("Unknown", "Left-Thalamus", "Right-Thalamus", "Brain-Stem", "something else")


def blocks(spacing: tuple[float, float] = (2.0, 1.0)) -> PairSet:
    """Two pairs on a 40 x 30 grid: the left thalamus at high, the right at low indices of axis 0.

    In the first pair moving lies 3 voxels further on along axis 0, in the second 3 voxels back.
    """
    fixed = torch.zeros(40, 30, dtype=torch.uint8)
    fixed[22:32, 5:15], fixed[8:18, 5:15], fixed[15:25, 18:26] = 1, 2, 3
    pair = torch.stack([fixed, fixed.roll(3, 0)])
    return PairSet(torch.stack([pair, pair.flip(0)]), NAMES, spacing, ("a~b", "b~a"))


@pytest.fixture
def ax() -> Axes:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def texts(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# ---- one picture


def test_axis_0_runs_right_and_axis_1_down(ax: Axes) -> None:
    image = torch.zeros(4, 6, dtype=torch.uint8)
    image[3, 1] = 3
    plots.show_labels(ax, image, blocks())
    shown = ax.images[0].get_array()
    assert shown.shape == (6, 4, 3)
    assert to_hex(shown[1, 3]).upper() == plots.STRUCTURES["Brain-Stem"]
    assert (np.delete(shown.reshape(24, 3), 1 * 4 + 3, axis=0) == 1).all()
    assert ax.get_xlim() == (-0.5, 3.5) and ax.get_ylim() == (5.5, -0.5)
    assert ax.get_aspect() == 0.5  # a voxel is 2 mm across and 1 mm down


def test_scale_bar_is_as_long_as_it_says(ax: Axes) -> None:
    pairs = blocks(spacing=(2.0, 2.0))
    plots.show_labels(ax, pairs.fixed[0], pairs, marks=True)
    left, right = ax.lines[0].get_xdata()
    assert [text.get_text() for text in ax.texts] == ["R", "L", "20 mm"]  # 40 voxels are 80 mm: at most 28
    assert (right - left) * 2 == pytest.approx(20)


def test_sides_come_from_the_names(ax: Axes) -> None:
    pairs = blocks()
    plots.show_labels(ax, pairs.fixed[0].flip(0), pairs, marks=True)
    assert [text.get_text() for text in ax.texts[:2]] == ["L", "R"]


def test_left_and_right_share_a_colour_and_unknown_names_get_one() -> None:
    colours = plots.structure_colours(blocks())
    assert colours.shape == (5, 3)
    assert (colours[0] == 1).all()
    assert (colours[1] == colours[2]).all()
    assert len({tuple(colour) for colour in colours}) == 4
    table = replace(blocks(), label_colours=((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (255, 0, 51)))
    assert plots.structure_colours(table)[4].tolist() == [1.0, 0.0, 0.2]
    assert (plots.structure_colours(table)[:4] == colours[:4]).all()


def test_overlap_has_blue_and_orange_outlines_at_the_edges(ax: Axes) -> None:
    fixed, moving = torch.zeros(2, 9, 9, dtype=torch.uint8)
    fixed[2:5, 3:7], moving[4:9, 3:7] = 1, 1
    plots.show_overlap(ax, fixed, moving, blocks())
    outlines = {to_hex(c.get_edgecolor()[0]).upper(): c.get_paths()[0].vertices for c in ax.collections}
    assert set(outlines) == {plots.FIXED, plots.MOVING}
    assert (outlines[plots.FIXED].min(0) == [1.5, 2.5]).all() and (
        outlines[plots.FIXED].max(0) == [4.5, 6.5]
    ).all()
    assert outlines[plots.MOVING][:, 0].max() == 8.5  # closed where the image ends
    agreement = ax.images[0].get_array().T < 1
    assert (agreement == ((fixed == moving) & (fixed > 0)).numpy()).all()


def test_grid_lines_lie_at_x_plus_u(ax: Axes) -> None:
    u = torch.zeros(2, 40, 30)
    u[0], u[1] = 1.5, -0.5
    plots.show_grid(ax, u, blocks())
    segments = ax.collections[0].get_segments()
    ends = np.array([segments[0][0], segments[0][-1]])
    assert np.allclose(ends - np.array([1.5, -0.5]), [[0, 0], [0, 29]])
    assert len(ax.collections) == 1  # nothing folds


def test_grid_marks_folds(ax: Axes) -> None:
    u = torch.zeros(2, 40, 30)
    u[0, 10], u[0, 12] = 1.5, -1.5  # folds along the whole line between
    plots.show_grid(ax, u, blocks())
    assert (ax.collections[1].get_offsets()[:, 0] == 11).all()
    assert len(ax.collections[1].get_offsets()) == 30


def test_arrows_and_their_length_in_millimetres(ax: Axes) -> None:
    u = torch.zeros(2, 40, 30)
    u[0], u[1] = 1.5, 4.0  # 3 mm and 4 mm
    plots.show_displacement(ax, u, blocks())
    assert np.allclose(ax.images[0].get_array(), 5.0)
    arrows = ax.collections[0]
    assert (arrows.U == 1.5).all() and (arrows.V == 4.0).all() and arrows.scale == 1 and arrows.angles == "xy"


def test_tokens_of_one_code_look_alike_and_masked_ones_grey(ax: Axes) -> None:
    plots.show_tokens(ax, torch.tensor([[0, 5, 9], [5, 9, 7]]), mask_token=9)
    shown = ax.images[0].get_array()  # (3, 2, RGB)
    assert (shown[1, 0] == shown[0, 1]).all() and (shown[0, 0] != shown[1, 0]).any()
    assert to_hex(shown[2, 0]).upper() == to_hex(shown[1, 1]).upper() == plots.MASKED


def test_no_two_codes_share_a_colour() -> None:
    colours = plots._token_colours(np.arange(1024), None)
    assert len(np.unique(colours.round(6), axis=0)) == 1024


@pytest.mark.parametrize("draw", [plots.show_labels, plots.show_grid])
def test_volumes_are_refused(ax: Axes, draw: object) -> None:
    with pytest.raises(ValueError, match="only 2D slices"):
        draw(
            ax,
            torch.zeros(3, 4, 5, 6)[:, :, :, 0] if draw is plots.show_labels else torch.zeros(3, 4, 5, 6),
            blocks(),
        )


# ---- finished figures


def test_a_returned_figure_is_shown_once() -> None:
    before = plt.get_fignums()
    assert isinstance(plots.pair_figure(blocks()), Figure)
    assert plt.get_fignums() == before


def test_pair_figure() -> None:
    figure = plots.pair_figure(blocks(), 1)
    assert texts(figure) == ["fixed", "moving", "outlines of both"]
    assert legend_texts(figure) == ["Thalamus", "Brain Stem"]
    frames = [to_hex(ax.spines["left"].get_edgecolor()).upper() for ax in figure.axes]
    assert frames[:2] == [plots.FIXED, plots.MOVING]
    shown = figure.axes[0].images[0].get_array().swapaxes(0, 1)
    assert (shown == plots.structure_colours(blocks())[blocks().fixed[1].numpy()]).all()


def test_pairs_figure() -> None:
    figure = plots.pairs_figure({"real": blocks(), "synthetic": blocks()[:1]})
    visible = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_ylabel() for ax in visible] == ["real", "", "synthetic", ""]
    assert len([ax for ax in plots.pairs_figure(blocks(), number=2).axes if ax.get_visible()]) == 4


def test_registration_figure_warps_moving_to_fixed() -> None:
    pairs = blocks()
    u = torch.zeros(2, 2, 40, 30)
    u[0, 0], u[1, 0] = 3.0, -3.0
    for index in (0, 1):
        figure = plots.registration_figure(pairs, u, index)
        assert texts(figure)[2] == "moving, warped"
        fixed, warped = (figure.axes[i].images[0].get_array() for i in (0, 2))
        assert (fixed == warped).all()


def test_training_curve_has_a_panel_for_each_quantity() -> None:
    history = [{"step": 10 * i, "loss": 10.0**-i, "dice": 0.5} for i in range(1, 5)]
    figure = plots.training_curve(history, "VQ autoencoder")
    assert texts(figure) == ["loss", "dice"]
    loss, dice = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30, 40]
    assert loss.get_yscale() == "log" and dice.get_yscale() == "linear"


def test_training_curve_hides_what_is_left_over() -> None:
    figure = plots.training_curve([{"step": 1, **dict.fromkeys("abcde", 1.0)}])
    assert [ax.get_visible() for ax in figure.axes] == [True] * 5 + [False]


def test_dice_figure_averages_sides_and_leaves_out_what_is_absent() -> None:
    dice = torch.tensor([[0.2, 0.4, 0.9, torch.nan], [0.4, 0.8, torch.nan, torch.nan]])
    figure = plots.dice_figure({"before": dice, "real": dice[0]}, NAMES)
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "all structures",
        "Thalamus",
        "Brain Stem",
        "something else",
    ]
    before = ax.lines[0].get_xdata()
    np.testing.assert_allclose(before, [0.55, 0.45, 0.9, np.nan])  # mean over the pairs of 0.5 and 0.6
    assert legend_texts(figure) == ["before", "real"]


def test_area_figure_is_relative_to_the_real_mean() -> None:
    pairs = blocks()
    half = pairs.labels.clone()
    half[:, :, :, 10:15] = 0  # of the thalami
    rows = metrics.compare_areas(pairs.labels, half, NAMES)
    figure = plots.area_figure(rows)
    real, synthetic = (container.lines[0].get_xdata() for container in figure.axes[0].containers)
    np.testing.assert_allclose(real, [100, 100, 100, np.nan])
    np.testing.assert_allclose(synthetic, [50, 50, 100, np.nan])


def test_codebook_figure_counts_codes() -> None:
    figure = plots.codebook_figure(torch.tensor([0, 5, 0, 1]))
    assert texts(figure) == ["2 of 4 codes in use"]


def test_memorisation_figure_shows_both_sets_in_percent() -> None:
    figure = plots.memorisation_figure(torch.full((4,), 0.1), torch.full((7,), 0.3), 0.2)
    ax = figure.axes[0]
    assert [sum(bar.get_height() for bar in bars) for bars in ax.containers] == pytest.approx([100, 100])
    assert ax.lines[0].get_xdata() == [0.2, 0.2]


@pytest.mark.parametrize("spatial", [(80, 96), (160, 192)])
def test_figures_of_real_size_are_made(spatial: tuple[int, int]) -> None:
    large = blocks((1.0, 1.0)).resized(spatial)
    figure = plots.registration_figure(large, torch.zeros(2, 2, *spatial))
    figure.savefig(io.BytesIO())  # lays the figure out
    sizes = [ax.get_window_extent() for ax in figure.axes]
    assert all(size.width / size.height == pytest.approx(40 / 30, rel=0.02) for size in sizes)  # millimetres


# ---- animations


def frames_of(page: str) -> list[np.ndarray]:
    found = re.findall(r'"data:image/png;base64,([^"]+)"', page)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(frame))).convert("RGB")).astype(int)
        for frame in found
    ]


@pytest.fixture(scope="module")
def unmasking() -> str:
    states = torch.full((40, 20), 8)
    for step in range(40):
        states[step, : step // 2 + 1] = 3
    return plots.unmasking_animation(states, 8, (5, 4), blocks((1.0, 1.0))[:1]).data


@pytest.fixture(scope="module")
def warping() -> str:
    u = torch.zeros(2, 2, 40, 30)
    u[:, 0] = 3.0
    return plots.warp_animation(blocks((1.0, 1.0)), u).data


def test_players_need_nothing_from_elsewhere(unmasking: str, warping: str) -> None:
    for page in (unmasking, warping):
        assert not re.search(r"<link|https?:|//[a-z]+\.|class=\"fa", page)
        labels = [label.strip() for label in re.findall(r"<button[^>]*>(.*?)</button>", page, re.DOTALL)]
        assert len(labels) == 9 and all(labels) and not any("<" in label for label in labels)
        assert 'alt="' in page
        assert len(page) < 400_000


def test_players_on_one_page_do_not_clash(unmasking: str, warping: str) -> None:
    ids = [set(re.findall(r'id="([^"]+)"', page)) for page in (unmasking, warping)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]


def test_unmasking_uncovers(unmasking: str) -> None:
    frames = frames_of(unmasking)
    assert len(frames) == plots.FRAMES
    grey = np.array([int(plots.MASKED[i : i + 2], 16) for i in (1, 3, 5)])
    covered = [(np.abs(frame - grey).max(-1) < 4).mean() for frame in frames]
    assert covered[0] > 0.5 and covered[-1] < 0.02
    assert all(later <= earlier + 1e-3 for earlier, later in zip(covered, covered[1:], strict=False))


def test_unmasking_of_tokens_alone() -> None:
    page = plots.unmasking_animation(torch.tensor([[2, 2], [0, 2], [0, 1]]), 2, (1, 2)).data
    assert len(frames_of(page)) == 3


def test_warping_ends_at_the_fixed_image(warping: str) -> None:
    first, *_, last = frames_of(warping)
    half = first.shape[1] // 2
    orange, blue = (
        np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (plots.MOVING, plots.FIXED)
    )

    def share(frame: np.ndarray, colour: np.ndarray) -> float:
        picture = frame[: int(0.85 * len(frame)), half + 5 :]  # the outlines, without the legend
        return (np.abs(picture - colour).max(-1) < 60).mean()

    assert share(first, blue) > 0 and share(first, orange) > 0
    assert share(last, blue) < 0.1 * share(first, blue)  # the orange outline lies on the blue one


def test_style_is_readable() -> None:
    with plt.rc_context():
        plots.use_style()
        assert min(plt.rcParams[size] for size in ("font.size", "xtick.labelsize", "legend.fontsize")) >= 10
