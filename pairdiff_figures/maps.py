"""Maps of numbers over one image: how much each spot grows or shrinks, and by how much a displacement is wrong.

Of a volume, they show a coronal plane, drawn as in ``figures.volumes``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet
from pairdiff_figures import slices, style, volumes

# Not the darkest ends: the black of folds stands out
AREAS = LinearSegmentedColormap.from_list("areas", colormaps["PuOr"](np.linspace(0.1, 0.9, 17)))


def _maps_figure(
    pairs: PairSet, maps: Mapping[str, np.ndarray], index: int, label: str, **colours: Any
) -> tuple[Figure, Colorbar]:
    """A closed figure with a panel for each named map (across, along), and their colour bar."""
    mm, volume = style.field_of_view(pairs), pairs.spatial_dims == 3
    figure, [axes] = style.image_figure([mm[0]] * len(maps), [mm[-1]])
    figure.set_figwidth(min(style.WIDTH, figure.get_figwidth() + 0.8))  # the colour bar
    letters = volumes.PLANES["coronal"].letters if volume else slices.sides(pairs.fixed[index].numpy(), pairs)
    for ax, (name, numbers) in zip(axes, maps.items(), strict=True):
        letters_here = letters if ax is axes[0] else ""
        spacing = (pairs.spacing[0], pairs.spacing[-1])
        image = style.show_image(ax, numbers, spacing, name, letters=letters_here, upward=volume, **colours)
    return figure, figure.colorbar(image, ax=list(axes), shrink=0.8, label=label)


def jacobian_figure(pairs: PairSet, displacements: Mapping[str, torch.Tensor], index: int = 0) -> Figure:
    """How much larger or smaller each spot of one fixed image becomes, in one panel for each named method.

    Displacements are float (N, D, *spatial), voxels, fixed to moving; of volumes, the middle coronal slice is shown.
    Colour shows the Jacobian determinant on a logarithmic scale, from a quarter to four times the area or volume:
    orange shrinks, purple grows. Black marks where the map folds.
    """
    volume, maps = pairs.spatial_dims == 3, {}
    middle = pairs.spatial[1] // 2
    for name, displacement in displacements.items():
        u = displacement[index].detach().cpu().float()
        if volume:
            u = u[:, :, middle - 1 : middle + 2]  # derivatives need the neighbours
        change = fields.jacobian_determinant(u[None])[0].numpy()
        change = change[:, 1] if volume else change
        maps[name] = np.log2(np.where(change > 0, change, np.nan))
    what, colours = "volume" if volume else "area", AREAS.with_extremes(bad=style.FOLDED)
    label = f"{what} in moving / {what} in fixed"
    figure, bar = _maps_figure(pairs, maps, index, label, cmap=colours, vmin=-2, vmax=2)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    if volume:
        figure.suptitle(volumes.slice_position(pairs, middle))
        figure.set_figheight(figure.get_figheight() + 0.3)
    return figure


def error_maps_figure(
    lengths: Mapping[str, torch.Tensor], pairs: PairSet, index: int = 0, label: str = "error, mm"
) -> Figure:
    """Lengths over one fixed image, such as errors of displacements, in one panel for each named method, on one scale.

    Args:
        lengths: by name, float (H, W), mm. Of volumes (H, W, D), the largest along each line from front to back is
            shown; another projection, (H, D), is shown as it is. NaN is white.
        pairs: the set that the images belong to, for spacing and sides; ``index`` is that of the pair.
        label: of the colour bar.
    """
    maps = {name: values.detach().cpu().double().numpy() for name, values in lengths.items()}
    maps = {name: np.fmax.reduce(values, axis=1) if values.ndim == 3 else values for name, values in maps.items()}
    highest = max(np.nanmax(values) for values in maps.values())
    return _maps_figure(pairs, maps, index, label, cmap=volumes.LENGTHS, vmin=0, vmax=max(highest, 1e-6))[0]
