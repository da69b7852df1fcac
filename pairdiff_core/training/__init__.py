"""Training: the loop, its batches, devices and processes, seeds, and pausing."""

from . import distributed
from .batches import Samples, batch_loader
from .devices import best_device, fast_in_bfloat16, new_fabric, precision
from .interrupt import Paused, pausing
from .loop import History, fit
from .seeds import generator, seed_of
