"""The figures and animations of the book, in one style.

``show_...`` draws one image on a given Axes; ``..._figure`` returns a finished Figure, ``..._animation`` a player for a
notebook. Fixed is blue and moving is orange, everywhere. Figures are closed in pyplot, so that a notebook shows the
one that a cell returns only once.
"""

from .animations import player, rotation_animation, slices_animation, slices_widget, unmasking_animation, warp_animation
from .architecture import architecture_figure
from .curves import (
    area_figure,
    cases_figure,
    codebook_figure,
    dice_figure,
    error_curves_figure,
    mean_interval,
    memorisation_figure,
    steps_figure,
    training_curve,
)
from .images import images_figure
from .landscape import landscape_figure
from .maps import error_maps_figure, jacobian_figure
from .slices import (
    labels_gallery_figure,
    pair_figure,
    pairs_figure,
    registration_figure,
    show_grid,
    show_labels,
    show_overlap,
    show_tokens,
)
from .style import (
    FIXED,
    GREEN,
    GREY,
    LINES,
    METHODS,
    MOVING,
    VERMILION,
    closed_figure,
    image_figure,
    legend_below,
    method_styles,
    structure_of,
    use_style,
)
from .volumes import (
    classes_legend,
    displacement_figure,
    gallery_figure,
    landmark_figure,
    planes_figure,
    projections_figure,
    show_from_the_front,
    show_projection,
    volume_pair_figure,
)
