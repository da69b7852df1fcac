"""Data sets of image pairs, real and phantom, behind one function, :func:`load_pairs`.

``phantom2d`` are drawn brains that need no download and have a known displacement; ``oasis2d`` are real label
slices from a folder in the neurite-oasis layout. ``phantom3d`` are drawn lungs, with displacement and landmarks;
``lung250m`` are real lung vessels from a folder in the layouts of Lung250M-4B.
"""

from .datasets import DATASETS, SPLITS, data_files, default_dataset, grid_affine, label_names, load_pairs
