"""Animations: players for slices and volumes, and a widget to browse the slices of a volume."""

import base64
import html
import io
import re
from collections.abc import Callable, Mapping

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import HTML
from matplotlib.animation import FuncAnimation
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage

from pairdiff_core.pairs import PairSet, depth_maps
from pairdiff_figures import slices, volumes
from pairdiff_figures.style import (
    FIXED,
    MASKED,
    MOVING,
    closed_figure,
    field_of_view,
    image_figure,
    legend_below,
    warped,
)

FRAMES = 24  # at most, in a player of tokens
TURNS = 20  # frames of a full turn
PLAYER_SLICES = 20  # at most: keeps a player of full-size volumes below 250 kB
WIDGET_SLICES = 12  # at most
WIDGET_PIXELS = 320  # width of a slice in the widget, at least, if that takes no more than 8 pixels per voxel
BLENDS = 5  # images from fixed to warped in the widget
DPI = 96
COLOURS = 128  # of a frame's palette: keeps players small
# For the buttons, in order, instead of matplotlib's icons, whose font comes from another host
SYMBOLS = ("&minus;", "|&#9664;", "&lsaquo;", "&#9664;", "||", "&#9654;", "&rsaquo;", "&#9654;|", "+")


def player(
    figure: Figure, draw: Callable[[int], None], frames: int, alt: str, mode: str = "once", start: int = 0
) -> HTML:
    """A JavaScript player that needs no kernel and no network.

    Args:
        draw: draws the frame with a given number, 0 to ``frames`` - 1, on ``figure``.
        alt: what the frames show: the alternative text of the picture, and part of the slider's name.
        mode: "once", "loop" or "reflect".
        start: the frame that a reader sees before pressing anything; choose one that is not empty.
    """
    draw(start)
    for _ in range(2):  # the layout needs two passes; then it stays, so that frames do not jump by a pixel
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    animation = FuncAnimation(figure, lambda frame: draw(frame) or [], frames=frames, interval=250)
    with plt.rc_context({"savefig.dpi": DPI}):
        page = animation.to_jshtml(default_mode=mode)
    page = re.sub(r"<link[^>]*>", "", page)
    page = re.sub(r"(anim\w+) = new Animation\([^)]*\);", rf"\g<0> \1.set_frame({start});", page)
    for symbol in SYMBOLS:
        page = re.sub(r'<i class="fa [^>]*></i>', symbol, page, count=1)
    alt = html.escape(alt)
    page = page.replace('<img id="', f'<img style="max-width: 100%" alt="{alt}" id="')
    page = page.replace('type="range"', f'type="range" aria-label="Frame: {alt}"')  # buttons have names already
    return HTML(re.sub(r"data:image/png;base64,([^\"']+)", _with_palette, page))


def _with_palette(match: re.Match[str]) -> str:
    """The data URL of a PNG, with fewer colours and a third as large."""
    image = Image.open(io.BytesIO(base64.b64decode(match[1].replace("\\\n", "")))).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


def unmasking_animation(states: torch.Tensor, mask_token: int, grid: tuple[int, int], pairs: PairSet) -> HTML:
    """A player that shows how an all-masked grid of tokens is unmasked, and the pair of images with it.

    Args:
        states: integers (S, L), one sequence after each of S sampling steps; at most FRAMES of them are shown.
        mask_token: the integer that stands for a masked token.
        grid: (H, W) with L = H * W, the order of the tokens.
        pairs: the pair that the last state decodes to; its images are uncovered with their tokens.
    """
    chosen = torch.linspace(0, len(states) - 1, min(FRAMES, len(states))).round().long()
    shown = states[chosen].cpu().reshape(-1, *grid)  # (frames, H, W)
    width, height = field_of_view(pairs)
    figure, [[tokens, *images]] = image_figure([width] * 3, [height])
    covers = []
    for ax, image, title, colour in zip(images, pairs.labels[0], ("fixed", "moving"), (FIXED, MOVING), strict=True):
        slices.show_labels(ax, image, pairs, title, colour, marks=title == "fixed")
        cover = np.full((grid[1], grid[0], 3), to_rgb(MASKED))  # one pixel per token, over the field of view
        extent = (*ax.get_xlim(), *ax.get_ylim())
        covers.append(ax.imshow(cover, extent=extent, aspect=ax.get_aspect(), zorder=1.5))

    def draw(frame: int) -> None:
        masked = (shown[frame] == mask_token).numpy()
        tokens.clear()
        title = f"step {int(chosen[frame])}: {masked.mean():.0%} masked"
        slices.show_tokens(tokens, shown[frame], mask_token, title)
        tokens.set_aspect(height / width * grid[0] / grid[1])  # the same field of view as the images
        for cover in covers:
            cover.set_alpha(masked.T.astype(float))

    alt = "Tokens are unmasked step by step until none is masked."
    return player(figure, draw, len(shown), alt, start=len(shown) // 2)


def warp_animation(pairs: PairSet, displacement: torch.Tensor, index: int = 0) -> HTML:
    """A player that warps the moving image onto the fixed one: it follows t * u as t goes from 0 to 1.

    It waits half-way, with both outlines apart. Displacements are float (N, 2, H, W), voxels, fixed to moving, one for
    each pair of the set.
    """
    times = np.linspace(0, 1, 11)
    width, height = field_of_view(pairs)
    figure, [axes] = image_figure([width] * 2, [height])
    legend_below(figure, 2, {"fixed": FIXED, "moving, warped": MOVING})

    def draw(frame: int) -> None:
        t = float(times[frame])
        for ax in axes:
            ax.clear()
        moved = warped(pairs, index, t * displacement[index])
        slices.show_labels(axes[0], moved, pairs, f"moving, warped: t = {t:.1f}", MOVING, marks=True)
        slices.show_overlap(axes[1], pairs.fixed[index], moved, pairs, "outlines")

    alt = "The moving image is warped onto the fixed one."
    return player(figure, draw, len(times), alt, mode="reflect", start=len(times) // 2)


def rotation_animation(images: Mapping[str, torch.Tensor], spacing_mm: float) -> HTML:
    """A player that turns named volumes uint8 (H, W, D) once around the body's axis D, drawn as lit surfaces.

    It waits after a tenth of a turn, where depth can be seen.
    """
    figure, [axes] = closed_figure(1, len(images), (2.4 * len(images), 2.6))

    def draw(frame: int) -> None:
        for ax, (name, image) in zip(axes, images.items(), strict=True):
            short = image.shape[0] - image.shape[1]  # the same space is needed in both directions
            square = F.pad(image, (0, 0, short // 2, short - short // 2)).numpy()
            turned = ndimage.rotate(square, 360 * frame / TURNS, axes=(0, 1), reshape=False, order=0)
            ax.clear()
            volumes.show_from_the_front(ax, depth_maps(torch.from_numpy(turned)[None])[0], spacing_mm)
            ax.set_title(name)

    return player(figure, draw, TURNS, "Vessels of lungs turn around the body's axis.", "loop", start=TURNS // 10)


def slices_with_vessels(pairs: PairSet, index: int, number: int) -> list[int]:
    """At most ``number`` coronal positions, evenly spread from a pair's first slice that shows vessels to its last.

    Slices with less than a twentieth of the vessel of the fullest one do not count: the first image would look empty.
    """
    filled = (pairs.labels[index] > 0).any(0).sum((0, 2)).numpy()
    low, high = np.flatnonzero(filled >= 0.05 * filled.max())[[0, -1]]
    return np.linspace(low, high, min(number, high - low + 1)).round().astype(int).tolist()


def slices_animation(pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None) -> HTML:
    """A player that goes through the coronal slices of a pair, before and, if there is one, after a registration.

    The displacement is float (3, H, W, D), voxels, fixed to moving; without one, the pair is shown as it is.
    """
    panels = {"": volumes.classes(*pairs.labels[index])}
    if displacement is not None:
        after = volumes.classes(pairs.fixed[index], warped(pairs, index, displacement))
        panels = {"before": panels[""], "after": after}
    positions = slices_with_vessels(pairs, index, PLAYER_SLICES)
    figure, [axes] = volumes.planes_figure(pairs, ["coronal"] * len(panels))
    figure.set_figheight(figure.get_figheight() + 0.3)
    volumes.classes_legend(figure, "moving" if displacement is None else "moving or warped")
    above = figure.suptitle(" ")

    def draw(frame: int) -> None:
        above.set_text(volumes.slice_position(pairs, positions[frame]))
        for ax, (when, classes) in zip(axes, panels.items(), strict=True):
            ax.clear()
            volumes.show_slice(ax, classes, pairs, positions[frame], when)

    alt = "The coronal slices of a pair of volumes, one after the other."
    return player(figure, draw, len(positions), alt, start=len(positions) // 2)


def slices_widget(pairs: PairSet, index: int = 0, displacement: torch.Tensor | None = None) -> ipywidgets.VBox:
    """A widget with two sliders: browse the coronal slices, and blend from the fixed image to the warped one.

    The displacement is float (3, H, W, D), voxels, fixed to moving; without one, it blends to the moving image. Every
    image is made beforehand and the sliders are linked in the browser, so the widget needs no kernel.
    """
    moving = pairs.moving[index] if displacement is None else warped(pairs, index, displacement)
    classes = volumes.classes(pairs.fixed[index], moving)
    positions = slices_with_vessels(pairs, index, WIDGET_SLICES)
    across, _, along = pairs.spatial
    times = min(8, -(-WIDGET_PIXELS // across))  # pixels per voxel
    width, height = times * across, round(times * along * pairs.spacing[2] / pairs.spacing[0])
    layout = ipywidgets.Layout(width=f"{width}px", height=f"{height}px")
    leaf, blend = (
        ipywidgets.IntSlider(n // 2, 0, n - 1, description=name, readout=False, layout={"width": "320px"})
        for name, n in (("slice", len(positions)), ("blend", BLENDS))
    )
    pages = []
    for position in positions:
        pngs = [_blended_png(classes[:, position], share, times) for share in np.linspace(0, 1, BLENDS)]
        images = [ipywidgets.Image(value=png, layout=layout) for png in pngs]
        stack = ipywidgets.Stack(images, selected_index=blend.value)
        ipywidgets.jslink((blend, "value"), (stack, "selected_index"))
        pages.append(ipywidgets.VBox([stack, ipywidgets.Label(volumes.slice_position(pairs, position))]))
    book = ipywidgets.Stack(pages, selected_index=leaf.value)
    ipywidgets.jslink((leaf, "value"), (book, "selected_index"))
    right, left, head, feet = (ipywidgets.HTML(f"<b>{letter}</b>") for letter in "RLHF")
    centred = {"align_items": "center"}
    image = ipywidgets.VBox([head, ipywidgets.HBox([right, book, left], layout=centred), feet], layout=centred)
    last = "moving" if displacement is None else "warped"
    ends = ipywidgets.HBox([blend, ipywidgets.Label(f"from fixed to {last}; dark where both have a vessel")])
    ends.layout.flex_flow = "row wrap"  # on a phone, the words stand below the slider
    return ipywidgets.VBox([leaf, ends, image], layout={"align_items": "flex-start"})


def _blended_png(classes: np.ndarray, share: float, times: int) -> bytes:
    """Classes (across, along) as a PNG of four colours: fixed at a strength of 1 - share, moving at ``share``."""
    strength = np.array([0.0, min(1.0, 2 * (1 - share)), min(1.0, 2 * share), 1.0])
    colours = 1 - strength[:, None] * (1 - volumes.CLASSES)
    if share in (0.0, 1.0):  # one image alone: where both have a vessel, it has the colour of that image
        colours[3] = colours[1 + int(share)]
    image = Image.fromarray(np.ascontiguousarray(classes.T[::-1]))
    image.putpalette((255 * colours).round().astype(np.uint8).flatten().tolist())
    out = io.BytesIO()
    ImageOps.scale(image, times, Image.Resampling.NEAREST).save(out, "PNG", optimize=True, bits=2)
    return out.getvalue()
