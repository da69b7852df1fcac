"""Measures how much memory an operation needs at once, as far as PyTorch shows it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """A context in which ``numel`` is the size of the largest tensor of a type that any operation has made.

    Float tensors are maps, activations, logits and displacements; label maps are uint8, and tokens other integers.
    """

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype, self.numel = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in ((args, kwargs), result)
        )
        old = {x.untyped_storage().data_ptr() for x in given}
        new = [x.numel() for x in made if x.dtype == self.dtype and x.untyped_storage().data_ptr() not in old]
        self.numel = max(self.numel, *new, 0)
        return result
