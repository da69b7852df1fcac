"""Tokens without a decoder: matching maps to pairs, and decoding them, on made-up maps whose answer is known."""

import torch

from benchmarks import token_maps
from pairdiff_core.data.breathing import box_of_vessels
from pairdiff_core.data.lung_frame import FRAME
from pairdiff_core.training import generator

CODES = 5


def maps_and_pairs(number=4):
    """Token maps int64 (N, *GRID), and pairs in which code c fills c fifths of the depth of its cell."""
    maps = torch.randint(CODES, (number, *token_maps.GRID), generator=generator(0, "maps"))
    cell = token_maps.CELL
    filled = torch.arange(cell) < cell * torch.arange(CODES)[:, None] / CODES  # (codes, cell)
    rows = filled[maps].flatten(3).byte()  # (N, *GRID, cell) -> (N, h, w, depth)
    image = rows.repeat_interleave(cell, 1).repeat_interleave(cell, 2)  # (N, *spatial)
    return maps, image[:, None].repeat(1, 2, 1, 1, 1)


def test_only_the_right_map_explains_the_vessels_of_a_pair():
    maps, pairs = maps_and_pairs()
    table = torch.tensor(token_maps.match(maps, pairs))
    assert torch.allclose(table.diag(), torch.ones(4), atol=1e-4)
    assert (table - torch.diag(table.diag())).max() < 0.1


def test_codes_without_any_relation_explain_nothing():
    share = torch.rand(3000, generator=generator(1, "share"))
    assert abs(token_maps.explained(torch.arange(3000) % 7, share)) < 0.02
    assert token_maps.explained((share > 0.5).long(), share) > 0.7


def test_the_decoder_learns_what_a_code_stands_for(tmp_path, monkeypatch):
    monkeypatch.setattr(token_maps, "STEPS", 30)
    monkeypatch.setattr(token_maps, "CROP", 4)
    maps, pairs = maps_and_pairs()
    decoder = token_maps.train_decoder(maps[:3], pairs[:3], CODES, tmp_path / "decoder.progress")
    share = float(pairs[:3].float().mean())
    unseen = token_maps.decoded(decoder, maps[3:], share)
    assert unseen.shape == pairs[3:].shape
    assert abs(float(unseen.float().mean()) - share) < 0.02, "as many voxels as asked for"
    agree = (unseen == pairs[3:]).float().mean()
    assert agree > 0.8, "on a map that it has not seen"


def test_points_on_vessels_are_found_after_a_shift_and_a_scale():
    image = torch.zeros(32, 26, 32, dtype=torch.uint8)
    image[4:28, 5:20, 6:30] = (torch.rand(24, 15, 24, generator=generator(2, "image")) < 0.3).byte()
    scale = torch.tensor(FRAME) / torch.tensor(image.shape)
    points = (image.nonzero() + 0.5) * scale - 0.5  # centres of the vessels' voxels, in mm of the frame
    assert token_maps.on_vessels(1.3 * points + 20, image) > 0.99
    low, high = box_of_vessels(image)
    anywhere = low + torch.rand(4000, 3, generator=generator(3, "points")) * (high - low)
    assert token_maps.on_vessels(anywhere, image) < 0.4
