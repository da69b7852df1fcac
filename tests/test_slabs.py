"""Decoding slab by slab gives what decoding the whole gives."""

from unittest import mock

import pytest
import torch

from pairdiff_core import vqae
from pairdiff_core.slabs import decode_in_slabs
from pairdiff_core.vqae import PairedVQAE


@pytest.mark.parametrize(
    ("grid", "strides"),
    [
        ((5, 7), (1, 2, 1, 2)),
        ((5, 4, 3), (2, 2, (1, 1, 2), 1)),
        ((5, 4, 3), (1, 2, 2, 1)),
        ((4, 3, 2), (2, (2, 1, 1))),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_slabs_are_pieces_of_the_whole(grid, strides, rows):
    torch.manual_seed(0)
    channels = (6, 7, 8, 9)[: len(strides)]
    decoder = PairedVQAE(len(grid), 2, channels, strides, codes=4).network.decode
    latent = torch.randn(2, channels[-1], *grid)
    with torch.no_grad():
        found, expected = decode_in_slabs(decoder, latent, rows, lambda slab: slab), decoder(latent)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "strides"), [((6, 8), (2, 2, 2)), ((4, 3, 2), (2, 2, (1, 1, 2), 1))])
def test_a_large_volume_is_decoded_so(grid, strides, monkeypatch):
    torch.manual_seed(0)
    model = PairedVQAE(len(grid), 3, (6, 7, 8, 9)[: len(strides)], strides, codes=16).eval()
    model.codebook.vectors.normal_()
    tokens = torch.randint(16, (2, *grid))
    whole = model.decode(tokens)
    monkeypatch.setattr(vqae, "LARGE", 0)
    monkeypatch.setattr(vqae, "SLAB", whole[0, 0, :3].numel() * 12)  # three rows at once
    used = mock.Mock(wraps=vqae.decode_in_slabs)
    monkeypatch.setattr(vqae, "decode_in_slabs", used)
    assert torch.equal(model.decode(tokens), whole) and used.call_args.args[2] == 3
