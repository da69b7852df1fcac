"""PairDiff: new pairs of medical images by discrete diffusion, and registration trained on them."""

__version__ = "0.1.0"
