"""How much of a codebook a set of tokens uses."""

from typing import NamedTuple

import torch
from torch import Tensor


class CodebookUse(NamedTuple):
    """How many of K codes occur."""

    used: float  # share of the codes that occur at least once, 0 to 1
    perplexity: float  # exp(entropy) of the code frequencies, 1 to K; K equally frequent codes have perplexity K
    counts: Tensor  # int64 (K,), how often each code occurs


def codebook_use(tokens: Tensor, codes: int) -> CodebookUse:
    """The use of a codebook by tokens of any shape. ValueError without tokens, or if one is not 0 to ``codes`` - 1."""
    if not tokens.numel() or tokens.min() < 0 or tokens.max() >= codes:
        raise ValueError(f"tokens must be integers from 0 to {codes - 1}, at least one")
    used, perplexity = codebook_statistics(tokens, codes).values()
    return CodebookUse(used.item(), perplexity.item(), _counts(tokens, codes))


def codebook_statistics(tokens: Tensor, codes: int) -> dict[str, Tensor]:
    """``codes used`` and ``perplexity`` as scalar tensors, as in :class:`CodebookUse`.

    For the training loop: the host does not wait for the GPU, so the tokens are not checked.
    """
    counts = _counts(tokens, codes)
    share = counts.double() / counts.sum()
    entropy = -torch.xlogy(share, share).sum()
    return {"codes used": (counts > 0).double().mean(), "perplexity": entropy.exp()}


def _counts(tokens: Tensor, codes: int) -> Tensor:
    flat = tokens.flatten().long()
    # torch.bincount would wait for the GPU to learn the size of its result
    return flat.new_zeros(codes).scatter_add_(0, flat, torch.ones_like(flat))
