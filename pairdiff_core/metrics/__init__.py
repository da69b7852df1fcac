"""Measures of registration, of codebook use, and of synthetic pairs and images against real ones.

All take tensors, 2D or 3D, and return tensors, named tuples, or dicts of numbers that fit into JSON. N, M are numbers
of pairs, I of images in each (2, or 1 for single images), D of axes, and C of labels, the background included.
"""

from .codebook import CodebookUse, codebook_statistics, codebook_use
from .images import compare_images, image_distances, image_errors, multiscale_ssim, similarity_of_samples
from .memorisation import CLOSE, MemorisationAudit, memorisation_audit, pair_distances
from .realism import (
    compare_areas,
    compare_components,
    compare_displacements,
    displacement_statistics,
    pair_features,
    precision_recall_density_coverage,
    share_in_real_range,
    structure_areas,
)
from .registration import (
    describe_errors,
    dice,
    folding_percent,
    hausdorff95,
    inverse_consistency_error,
    log_jacobian_sd,
    mean_dice,
    mean_over_pairs,
    target_registration_error,
)
from .synthetic import audit_as_json, compare_sets
