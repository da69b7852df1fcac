"""Data sets of image pairs, real and phantom, behind one function, :func:`load_pairs`.

``phantom2d`` are drawn brains that need no download and have a known displacement; ``oasis2d`` are real label
slices from a folder in the neurite-oasis layout. ``phantom3d`` are drawn lungs, with displacement and landmarks;
``lung250m`` are real lung vessels from a folder in the layouts of Lung250M-4B. ``own`` are label maps of your own, from
a folder that ``pairdiff prepare`` wrote.
"""

from .datasets import DATASETS, OWN, SPLITS, data_files, default_dataset, describe_data, grid_affine, load_pairs
from .description import DataDescription, description_from_json
from .own import DESCRIPTION, SPLIT_KEYS, OwnData, find_own, load_own_pairs, read_own
