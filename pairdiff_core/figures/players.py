"""A player for notebooks: the frames of an animation with buttons, in one piece of HTML."""

import base64
import io
import re
from collections.abc import Callable

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from PIL import Image

DPI = 80
COLOURS = 128  # of a frame's palette: keeps players small
# For the buttons, in their order, instead of matplotlib's icons, whose font comes from another host
SYMBOLS = ("&minus;", "|&#9664;", "&lsaquo;", "&#9664;", "||", "&#9654;", "&rsaquo;", "&#9654;|", "+")


def player(figure: Figure, draw: Callable[[int], None], frames: int, alt: str, mode: str = "once") -> HTML:
    """A JavaScript player that needs no kernel and no network.

    Args:
        figure: the figure that ``draw`` draws on.
        draw: draws the frame of a number, 0 to ``frames`` - 1.
        alt: what the frames show, for those who cannot see them.
        mode: "once", "loop" or "reflect".
    """
    animation = FuncAnimation(figure, lambda frame: draw(frame) or [], frames=frames, interval=250)
    with plt.rc_context({"savefig.dpi": DPI}):
        page = animation.to_jshtml(default_mode=mode)
    page = re.sub(r"<link[^>]*>", "", page)
    for symbol in SYMBOLS:
        page = re.sub(r'<i class="fa [^>]*></i>', symbol, page, count=1)
    page = page.replace('<img id="', f'<img style="max-width: 100%" alt="{alt}" id="')
    return HTML(re.sub(r"data:image/png;base64,([^\"']+)", _with_palette, page))


def _with_palette(match: re.Match[str]) -> str:
    """The data address of a PNG in few colours, a third as large."""
    image = Image.open(io.BytesIO(base64.b64decode(match[1].replace("\\\n", "")))).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
