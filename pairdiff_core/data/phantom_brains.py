"""Phantom brains: coronal label slices drawn from curves, with an exactly known displacement between any two.

One *template* brain is drawn on the field of view of the OASIS slices, 160 x 192 mm, with the labels of
neurite-oasis. A *subject* is the template seen through a smooth invertible warp phi, drawn at random from a seed:
``labels(x) = template(phi(x))``. So a pair has a known displacement, ``phi_moving^-1 o phi_fixed``, and known
landmarks, the points phi_fixed^-1(p) and phi_moving^-1(p) of the same template point p.

Array axis 0 runs from the patient's left to the right, axis 1 from the crown downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline

from pairdiff_core import fields
from pairdiff_core.pairs import PairSet, resize_labels

SPATIAL = (160, 192)  # the grid of the OASIS slices, 1 mm voxels; warps use it for every output grid
MIDLINE = 79.5  # mm along axis 0

# fmt: off
# id = position; names and colours are those of seg24_labels.txt and seg4_labels.txt
STRUCTURES = (
    ("Unknown", (0, 0, 0)), ("Left-Cerebral-White-Matter", (98, 106, 48)), ("Left-Cerebral-Cortex", (56, 43, 77)),
    ("Left-Lateral-Ventricle", (214, 179, 236)), ("Left-Thalamus", (148, 170, 248)),
    ("Left-Caudate", (196, 175, 156)), ("Left-Putamen", (160, 241, 99)), ("Left-Pallidum", (215, 184, 40)),
    ("3rd-Ventricle", (124, 224, 159)), ("Brain-Stem", (47, 204, 196)), ("Left-Hippocampus", (222, 77, 59)),
    ("Left-Amygdala", (225, 44, 156)), ("Left-VentralDC", (57, 104, 143)),
    ("Left-Cerebellum-Cortex", (130, 126, 46)), ("Right-Cerebral-White-Matter", (41, 66, 41)),
    ("Right-Cerebral-Cortex", (184, 153, 179)), ("Right-Lateral-Ventricle", (95, 172, 204)),
    ("Right-Thalamus", (122, 139, 254)), ("Right-Caudate", (213, 250, 121)), ("Right-Putamen", (187, 244, 179)),
    ("Right-Pallidum", (220, 188, 191)), ("Right-Hippocampus", (123, 228, 69)), ("Right-Amygdala", (164, 195, 221)),
    ("Right-VentralDC", (152, 120, 106)), ("Right-Cerebellum-Cortex", (130, 144, 194)),
)
TISSUES = (
    ("Unknown", (0, 0, 0)), ("Cortex", (205, 62, 78)), ("Subcortical-Gray-Matter", (230, 148, 34)),
    ("White-Matter", (245, 245, 245)), ("CSF", (120, 18, 134)),
)
# fmt: on
# tissue of each structure: 1 cortex (of the cerebellum too), 2 subcortical grey, 3 white matter, 4 CSF
TISSUE_OF_STRUCTURE = (0, 3, 1, 4, 2, 2, 2, 2, 4, 2, 2, 2, 2, 1, 3, 1, 4, 2, 2, 2, 2, 2, 2, 2, 1)
RIGHT_OF_LEFT = (0, 14, 15, 16, 17, 18, 19, 20, 8, 9, 21, 22, 23, 24)  # the same structure on the other side
CEREBELLUM = 13  # the only structure with folia
LABEL_TABLES = {5: TISSUES, 25: STRUCTURES}
LABEL_OF_STRUCTURE = {5: TISSUE_OF_STRUCTURE, 25: range(25)}  # by number of labels

# The template, drawn for one half: points are (mm from the midline, mm below the top of the field of view).

CORTEX_MM = 2.9  # thickness of the ribbon
FISSURE_MM = 0.9  # half the width of a sulcus
CROWN_MM = 6.0  # how far from a sulcus the crowns of its gyri begin to round off
REACH_MM = 12.0  # distances are computed up to this; all deeper parts are white matter or nuclei
FINE = 3  # the template is stored as an image of 1 / FINE mm

# fmt: off
# the pial surface from the corpus callosum over the crown and the temporal pole to the parahippocampal gyrus
PIAL = (
    (1.2, 52), (1.0, 38), (1.5, 26), (6, 18), (15, 16.5), (28, 19), (41, 25), (52, 35), (60, 47), (65.5, 61),
    (69, 77), (70, 92), (67, 106), (59, 115), (48, 119), (37, 118), (29, 113), (25, 106),
)
# from there back to the callosum inside the brain, where there is no cortex
INNER = ((24.5, 100), (20, 95), (4, 93), (0, 90), (0, 54))
SULCI_LEFT = (  # seventh and eighth: the Sylvian fissure and the insula; last: the cingulate sulcus
    ((16, 12), (17, 22), (13.5, 30), (15, 36)), ((33, 16), (30, 26), (33.5, 34), (28, 41), (27, 47)),
    ((41, 27), (40, 31)), ((50, 31), (45, 40), (47, 46), (39, 52)), ((63, 51), (57, 54), (54, 60), (45, 60.5)),
    ((69, 66), (64, 67.5)), ((73, 80), (63, 78), (53, 80.5), (46, 78.5), (42.5, 72), (40.5, 65)),
    ((47.5, 79), (44, 84), (42.5, 90)), ((73, 96), (64, 93), (56, 96.5), (49, 94)),
    ((64, 113), (58, 106), (51, 107)), ((41, 122), (42, 114), (40, 110)),
    ((-1, 40), (5, 39.5), (10.5, 44), (17, 43)),
)
SULCI_RIGHT = (
    ((11, 12), (12, 20), (10, 26)), ((25, 14), (23, 24), (26.5, 32), (21, 40)),
    ((41, 22), (38, 31), (40, 38), (33, 46), (34, 51)), ((55, 37), (51, 42.5)),
    ((59, 45), (53, 51), (53, 57), (44, 58)), ((70, 64), (63, 64), (57, 68), (51, 67)),
    ((73, 84), (63, 80), (53, 79), (46, 81), (42.5, 74), (42, 67)), ((48, 81), (44, 86), (42, 92)),
    ((72, 98), (62, 94), (55, 92), (50, 95)), ((69, 106), (64, 103)), ((57, 119), (53, 111), (47, 109)),
    ((35, 121), (37.5, 114)), ((-1, 43), (6, 42), (12, 46), (16, 44.5)), ((-1, 30), (5, 31)),
)
# (label on the left, outline), drawn on top of each other in this order; 0 is CSF around the third ventricle
NUCLEI = (
    (0, ((-4, 77), (3, 77), (3.5, 84), (4, 94), (-4, 94))),
    (9, ((-6, 98), (4, 99), (9, 102), (14, 107), (15.5, 115), (13, 124), (9, 131), (7, 142), (5, 146), (-6, 146))),
    (12, ((2.5, 95), (10, 93), (19, 94), (22.5, 97.5), (19, 104), (12, 108), (5, 105))),
    (3, ((1, 61), (7, 57), (15, 55), (20.5, 58), (19, 64.5), (13, 71), (6, 75), (1.5, 75))),
    (5, ((20, 57.5), (24, 60), (23.5, 66), (19, 71.5), (12, 75.5), (10, 74), (16, 69), (19.5, 64))),
    (4, ((3, 79), (8, 76), (15, 76.5), (20, 82), (20.5, 88.5), (15, 92.5), (6, 92.5), (2.5, 88))),
    (7, ((21.5, 86), (25, 81), (28.5, 84), (29, 91), (26, 94), (22.5, 91))),
    (6, ((28, 78), (31.5, 70), (35, 75), (36.5, 84), (34, 91), (29.5, 94), (29, 87))),
    (3, ((34, 98.5), (41, 99.5), (46.5, 104), (44, 106), (38, 103))),
    (10, ((26, 104), (33, 102.5), (39, 103), (43.5, 106.5), (41, 110.5), (33, 111), (28, 109))),
    (11, ((25, 99), (29, 95.5), (34.5, 97), (35, 101), (30, 103), (26, 102.5))),
    (13, ((17, 122), (24, 119.5), (33, 122), (43, 125), (48, 131), (45, 138), (36, 142), (25, 143),
          (15, 140), (14, 131))),
    (8, ((0, 79.5), (2, 81), (2.4, 86), (1.5, 91), (-1.5, 91), (-2.4, 86), (-2, 81))),
)
FOLIA = (
    ((52, 127), (44, 130.5), (36, 130), (28, 131.5)), ((50, 137), (42, 136), (35, 136.5)),
    ((36, 118), (34, 124), (29, 127)), ((30, 147), (31, 140), (27, 136.5)), ((20, 146), (21, 139), (19.5, 134)),
)
# fmt: on


def _curve(points: Sequence[Sequence[float]], closed: bool = False) -> np.ndarray:
    """A smooth line through control points (Catmull-Rom), as a polyline float32 (P, 2) of six steps a segment."""
    knots = np.pad(points, ((1, 2), (0, 0)), "wrap") if closed else np.array(points)
    first, last = (1, len(points) + 1) if closed else (0, len(points) - 1)
    curve = CubicHermiteSpline(np.arange(len(knots)), knots, np.gradient(knots, axis=0))
    return curve(np.linspace(first, last, 6 * (last - first) + 1)).astype(np.float32)


def _distance(x: np.ndarray, y: np.ndarray, lines: Sequence[np.ndarray]) -> np.ndarray:
    """Distance in mm of the points (x, y), each (M,), from the nearest of some polylines (P, 2), at most REACH_MM."""
    squared = np.full(x.shape, REACH_MM**2, np.float32)
    for line in lines:
        for (x0, y0), (x1, y1) in zip(line[:-1].tolist(), line[1:].tolist(), strict=True):
            dx, dy, along_x, along_y = x - x0, y - y0, x1 - x0, y1 - y0
            t = ((dx * along_x + dy * along_y) / (along_x**2 + along_y**2)).clip(0, 1)
            squared = np.minimum(squared, (dx - t * along_x) ** 2 + (dy - t * along_y) ** 2)
    return np.sqrt(squared)


def _inside(x: np.ndarray, y: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Whether the points (x, y), each (M,), lie in a closed polyline (P, 2), by the even-odd rule."""
    inside = np.zeros(x.shape, bool)  # not matplotlib's Path: it is inconsistent for points on the outline
    for (x0, y0), (x1, y1) in zip(outline.tolist(), np.roll(outline, -1, axis=0).tolist(), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (x1 - x0) * (y - y0) / (y1 - y0))
    return inside


def _draw_half(x: np.ndarray, y: np.ndarray, sulci: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Labels of one half of the template at the points (x, y), each (M,), with the ids of the left side.

    The cortex is everything within CORTEX_MM of the pial surface, which extends into the brain along the sulci.
    """
    pial = _curve(PIAL)
    from_pial = _distance(x, y, [pial])
    from_sulcus = _distance(x, y, [_curve(sulcus) for sulcus in sulci]) - FISSURE_MM
    # the smaller of both, rounded off where they are nearly equal, so that gyri get round crowns
    mix = (CROWN_MM - np.abs(from_pial - from_sulcus)).clip(0) / CROWN_MM
    depth = np.minimum(from_pial, from_sulcus) - mix**2 * CROWN_MM / 4
    cerebrum = _inside(x, y, np.concatenate([pial, INNER])) & (depth > 0)
    labels = np.where(cerebrum, np.where(depth < CORTEX_MM, 2, 1), 0)
    between_folia = _distance(x, y, [_curve(line) for line in FOLIA]) > FISSURE_MM
    for label, outline in NUCLEI:
        shape = _inside(x, y, _curve(outline, closed=True))
        labels[shape & between_folia if label == CEREBELLUM else shape] = label
    return labels


@lru_cache(maxsize=1)
def _template() -> torch.Tensor:
    """The template with 24 structures as an image of 1 / FINE mm, uint8 (160 * FINE, 192 * FINE)."""
    x, y = (np.arange(size * FINE, dtype=np.float32) / FINE + (0.5 / FINE - 0.5) for size in SPATIAL)
    across, down = (grid.ravel() for grid in np.meshgrid(np.abs(x - MIDLINE), y, indexing="ij"))
    right = np.repeat(x > MIDLINE, len(y))
    labels = np.empty(len(across), np.uint8)
    labels[~right] = _draw_half(across[~right], down[~right], SULCI_LEFT)
    labels[right] = np.array(RIGHT_OF_LEFT)[_draw_half(across[right], down[right], SULCI_RIGHT)]
    return torch.from_numpy(labels.reshape(len(x), len(y)))


def _template_landmarks() -> torch.Tensor:
    """Points to find in every subject: the ends of the sulci and the centres of the nuclei, (K, 2) in mm."""
    centres = [np.mean(line, axis=0).tolist() for label, line in NUCLEI if label not in (0, 8, 9)]
    points = []
    for side, sulci in ((-1, SULCI_LEFT), (1, SULCI_RIGHT)):
        points += [(MIDLINE + side * across, down) for across, down in [sulcus[-1] for sulcus in sulci] + centres]
    return torch.tensor([*points, (MIDLINE, 86.0), (MIDLINE, 115.0)])  # last: third ventricle, brain stem


@dataclass(frozen=True, eq=False)
class BrainSubjects:
    """Phantom subjects with their displacement to the template."""

    labels: torch.Tensor  # uint8 (S, *spatial) on the grid that was asked for
    to_template: torch.Tensor  # float (S, 2, 160, 192), displacement phi(x) - x in mm, from subject to template
    from_template: torch.Tensor  # float (S, 2, 160, 192), the inverse displacement
    landmarks: torch.Tensor  # float (S, K, 2) in mm, voxels of the 160 x 192 grid; point k is the same in all
    names: tuple[str, ...]


def _subject_velocity(seed: int, index: int) -> torch.Tensor:
    """The random velocity (1, 2, 160, 192), mm, whose flow takes subject ``index`` to the template."""
    generator = torch.Generator().manual_seed((seed << 20) + index)
    from_centre = fields.identity_grid(SPATIAL) - torch.tensor([MIDLINE, 80.0]).reshape(2, 1, 1)
    size = torch.randn((2, 2), generator=generator) * torch.tensor([[0.05, 0.02], [0.02, 0.05]])
    velocity = torch.einsum("de,ehw->dhw", size, from_centre)[None]  # scaled, sheared, rotated
    for amplitude, smoothness in ((1.8, 60.0), (1.6, 30.0), (1.0, 16.0)):  # head, lobes, gyri
        scale = {"amplitude": amplitude, "smoothness": smoothness}
        velocity += fields.random_velocity(1, SPATIAL, **scale, generator=generator)
    widths = 0.25 * torch.randn(2, generator=generator) - 0.05  # ventricles differ most between people
    for side, width in zip((-1, 1), (widths[0], widths[0] + 0.3 * widths[1]), strict=True):
        from_ventricle = from_centre - torch.tensor([side * 9.0, -15.0]).reshape(2, 1, 1)
        velocity += width * from_ventricle * torch.exp(-from_ventricle.square().sum(0) / (2 * 9.0**2))
    # nothing moves at the edge of the field of view: the warp maps it onto itself and stays invertible there
    for axis, voxels in enumerate(SPATIAL):
        place = torch.arange(voxels)
        rise = (torch.minimum(place, voxels - 1 - place) / 12).clamp(max=1)
        velocity = velocity * (rise.square() * (3 - 2 * rise)).reshape((-1, 1) if axis == 0 else (1, -1))
    return velocity


def brain_subjects(
    number: int, *, spatial: Sequence[int] = SPATIAL, num_labels: int = 5, seed: int = 0, first: int = 0
) -> BrainSubjects:
    """Phantom subjects ``first`` to ``first + number - 1`` of a seed; each is the same for every ``number``.

    Every grid ``spatial`` covers the same 160 x 192 mm, by majority vote. ``num_labels`` is 5 (tissues) or 25
    (structures), background included.
    """
    velocity = torch.cat([_subject_velocity(seed, first + index) for index in range(number)])
    to_template, from_template = fields.exponentiate(velocity), fields.exponentiate(-velocity)
    # labels are looked up on a grid at least this fine; a coarser one takes the majority
    grid = tuple(max(size, native) for size, native in zip(spatial, SPATIAL, strict=True))
    places = (fields.identity_grid(grid) + fields.resize_field(to_template, grid)).movedim(1, -1)
    places = fields.resize_points(places, grid, SPATIAL)  # (S, H, W, 2) in mm of the template
    template = _template()
    pixels = fields.resize_points(places, SPATIAL, template.shape).round().long()
    across, down = (pixels[..., axis].clamp(0, size - 1) for axis, size in enumerate(template.shape))
    labels = torch.tensor(LABEL_OF_STRUCTURE[num_labels], dtype=torch.uint8)[template[across, down].long()]
    if tuple(spatial) != grid:
        labels = resize_labels(labels, spatial, num_labels)
    points = _template_landmarks()
    return BrainSubjects(
        labels=labels,
        to_template=to_template,
        from_template=from_template,
        landmarks=torch.stack([points + fields.sample_at(back, points) for back in from_template]),
        names=tuple(f"PHANTOM_{first + index:04d}" for index in range(number)),
    )


def brain_pairs(
    number: int,
    *,
    subjects: int,
    spatial: Sequence[int] = SPATIAL,
    num_labels: int = 5,
    seed: int = 0,
    first_subject: int = 0,
) -> PairSet:
    """Pairs of two different phantom subjects, with displacement and landmarks.

    At most ``number`` pairs, chosen at random by ``seed`` from all ordered pairs of ``subjects`` people (at least 2),
    numbered from ``first_subject``; see :func:`brain_subjects` for ``spatial`` and ``num_labels``.
    """
    people = brain_subjects(subjects, spatial=spatial, num_labels=num_labels, seed=seed, first=first_subject)
    ordered = torch.tensor(list(permutations(range(subjects), 2)))
    generator = torch.Generator().manual_seed((seed << 20) + first_subject)
    fixed, moving = ordered[torch.randperm(len(ordered), generator=generator)[:number]].T
    displacement = [  # a few at a time: on a coarse grid the full-size fields would take most of the memory
        fields.resize_field(fields.compose(people.to_template[i], people.from_template[j]), spatial)
        for i, j in zip(fixed.split(32), moving.split(32), strict=True)
    ]
    landmarks = torch.stack([people.landmarks[fixed], people.landmarks[moving]], 2)  # (N, K, 2, 2)
    names, colours = zip(*LABEL_TABLES[num_labels], strict=True)
    return PairSet(
        labels=torch.stack([people.labels[fixed], people.labels[moving]], 1),
        label_names=names,
        spacing=tuple(old / new for old, new in zip(SPATIAL, spatial, strict=True)),
        names=tuple(f"{people.names[i]}~{people.names[j]}" for i, j in zip(fixed, moving, strict=True)),
        displacement=torch.cat(displacement),
        landmarks=tuple(fields.resize_points(landmarks, SPATIAL, spatial)),
        label_colours=colours,
    )
