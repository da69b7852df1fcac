"""The paired autoencoder and its codebook, in 2D and 3D."""

from dataclasses import replace

import pytest
import torch
from largest import LargestTensor

from pairdiff_core import vqae
from pairdiff_core.pairs import one_hot
from pairdiff_core.profiles import get_profile

GRIDS = [(16, 24), (8, 16, 16)]


def small_model(dims, num_labels=3, channels=(8, 16), strides=(2, 2), codes=16):
    torch.manual_seed(0)
    settings = replace(get_profile("quick").vqae, channels=channels, strides=strides, codes=codes, fade_in=0)
    return vqae.PairedVQAE(settings, dims, num_labels)


def with_codes(model):
    """A model in evaluation mode, with a random codebook instead of an empty one."""
    model.codebook.vectors.normal_()
    return model.eval()


def random_pairs(spatial, number=2, num_labels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, num_labels, (number, 2, *spatial), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("spatial", GRIDS)
def test_shapes_and_types(spatial):
    model, labels = small_model(len(spatial)), random_pairs(spatial)
    output = model(labels)
    grid = tuple(size // 4 for size in spatial)
    assert output.logits.shape == (2, 2, 3, *spatial)
    assert output.tokens.shape == (2, *grid) and output.tokens.dtype == torch.int64
    assert int(output.tokens.min()) >= 0 and int(output.tokens.max()) < 16
    decoded = model.eval().decode(model.encode(labels))
    assert decoded.shape == labels.shape and decoded.dtype == torch.uint8


def test_the_encoder_sees_both_images_without_background():
    model, labels = small_model(2), random_pairs((16, 24))
    maps = model.to_maps(labels)
    assert maps.shape == (2, 4, 16, 24)
    torch.testing.assert_close(maps[:, :2], one_hot(labels[:, 0], 3)[:, 1:])
    torch.testing.assert_close(maps[:, 2:], one_hot(labels[:, 1], 3)[:, 1:])


def test_a_grid_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"multiples of \(4, 4\)"):
        small_model(2).encode(random_pairs((16, 22)))


def test_a_stride_may_differ_between_axes():
    model = small_model(3, num_labels=2, strides=(2, (2, 1, 2)))
    labels = random_pairs((8, 6, 8), num_labels=2)
    output = model(labels)
    assert output.logits.shape == (2, 2, 2, 8, 6, 8)
    assert tuple(output.tokens.shape[1:]) == model.token_grid((8, 6, 8)) == (2, 3, 2)


def test_each_latent_takes_its_nearest_code_and_passes_its_gradient():
    codebook = vqae.Codebook(3, 2).eval()
    codebook.vectors.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]]))
    latent = torch.tensor([[0.9, 0.2], [0.1, 0.1], [1.0, 4.0]]).T.reshape(1, 2, 1, 3).requires_grad_()
    quantised = codebook(latent)
    assert quantised.tokens.flatten().tolist() == [1, 0, 2]
    torch.testing.assert_close(quantised.latent[0, :, 0].T, codebook.vectors[[1, 0, 2]])
    expected = ((latent.detach() - quantised.latent.detach()) ** 2).mean()
    torch.testing.assert_close(quantised.commitment.detach(), expected)
    (3 * quantised.latent).sum().backward()
    torch.testing.assert_close(latent.grad, torch.full_like(latent, 3.0))


def test_codes_move_to_the_mean_of_their_latents():
    torch.manual_seed(0)
    codebook = vqae.Codebook(2, 1, decay=0.9)
    latent = torch.tensor([-1.0, -1.2, 3.0, 3.4]).reshape(1, 1, 2, 2)
    for _ in range(100):
        codebook(latent)
    torch.testing.assert_close(codebook.vectors.flatten().sort().values, torch.tensor([-1.1, 3.2]), atol=1e-3, rtol=0)


def test_evaluation_leaves_the_codebook_alone():
    codebook = vqae.Codebook(4, 2)
    codebook(torch.randn(1, 2, 4, 4))
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    codebook.eval()(torch.randn(1, 2, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())


def test_dead_codes_come_back_to_life():
    """62 of 64 codes start far from all of the 64 clusters; without revival, two codes would be used for all."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(64, 8, generator=generator)

    def batch():
        chosen = torch.randint(64, (512,), generator=generator)
        return (centres[chosen] + 0.1 * torch.randn(512, 8, generator=generator)).T.reshape(1, 8, 16, 32)

    def used_after_training(revive_below):
        torch.manual_seed(0)
        codebook = vqae.Codebook(64, 8, decay=0.9, revive_below=revive_below)
        codebook.vectors.fill_(1e3)
        codebook.vectors[:2] = centres[:2]
        codebook.counts.fill_(8.0)
        codebook.sums.copy_(8 * codebook.vectors)
        for _ in range(100):
            codebook(batch())
        return len(codebook.eval()(batch()).tokens.unique())

    assert used_after_training(0.05) >= 58
    assert used_after_training(0.0) == 2


def test_the_loss_prefers_the_truth_and_counts_foreground_more():
    labels = random_pairs((16, 24))

    def loss(logits, commitment=0.0):
        output = vqae.Reconstruction(logits, torch.zeros(1), torch.tensor(commitment))
        return float(vqae.reconstruction_loss(output, labels))

    truth = torch.nn.functional.one_hot(labels.long(), 3).movedim(-1, 2).float() * 20
    assert loss(truth) < 1e-3 < loss(torch.zeros_like(truth)) < loss(-truth)
    assert loss(truth, commitment=2.0) == pytest.approx(0.2, abs=1e-3)
    missed = {label: truth.where(labels[:, :, None] != label, 0 * truth) for label in (0, 1)}
    assert loss(missed[1]) > 1.5 * loss(missed[0])


@pytest.mark.parametrize("spatial", GRIDS)
def test_it_learns_to_reconstruct_two_pairs(spatial):
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, size) for size in spatial], indexing="ij"))
    radius = grid.norm(dim=0)
    labels = torch.stack([(radius < r).byte() + (radius < r / 2).byte() for r in (0.9, 0.7, 0.5, 0.6)])
    labels = labels.unflatten(0, (2, 2))
    model, losses = small_model(len(spatial), codes=32), []
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(90):
        terms = vqae.training_loss(model, labels, codes=32)
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
        losses.append(float(terms["loss"].detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < terms["codes used"] <= 1 and terms["perplexity"] >= 1 and terms["commitment"] > 0
    assert (model.eval().decode(model.encode(labels)) == labels).float().mean() > 0.9


def test_decoding_takes_the_weights_of_the_loss_back():
    """With 40 % foreground and weights of 2.5 to 1, the decoder learns shares of 0.6 to 0.4 x 2.5 = 1."""
    for share, expected in ((0.40, 0), (0.60, 1)):
        taught = torch.tensor([1 - share, vqae.FOREGROUND_WEIGHT * share]).log()
        assert taught.argmax() == 1
        logits = taught.repeat(2)[None, :, None, None].expand(1, 4, 16, 24)
        assert (vqae.most_likely(logits) == expected).all()


@pytest.mark.parametrize("spatial", GRIDS)
def test_whole_sets_go_through_in_batches_and_take_no_more_memory(spatial, monkeypatch):
    model, largest, done = with_codes(small_model(len(spatial))), [], []
    monkeypatch.setattr(vqae, "VOXELS_AT_ONCE", 2 * 2 * torch.tensor(spatial).prod().item())  # two pairs
    for number in (3, 12):
        labels = random_pairs(spatial, number)
        with LargestTensor() as memory:
            tokens = vqae.encode_pairs(model, labels)
            decoded = vqae.decode_labels(model, tokens)
        largest.append(memory.numel)
        done.append((labels, tokens, decoded))
    assert largest[0] == largest[1]
    labels, tokens, decoded = done[0]
    assert tokens.dtype == torch.int16 and decoded.dtype == torch.uint8
    assert torch.equal(tokens.long(), model.encode(labels)) and torch.equal(decoded, model.decode(tokens.long()))


STRIDES = [
    ((5, 7), (1, 2, 1, 2)),
    ((5, 4, 3), (2, 2, (1, 1, 2), 1)),
    ((5, 4, 3), (1, 2, 2, 1)),
    ((4, 3, 2), (2, (2, 1, 1))),
]


@pytest.mark.parametrize(("grid", "strides"), STRIDES)
@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
def test_tiles_are_parts_of_the_whole(grid, strides, rows):
    channels = (6, 7, 8, 9)[: len(strides)]
    decoder = small_model(len(grid), 2, channels, strides).network.decode
    latent = torch.randn(2, channels[-1], *grid)
    with torch.no_grad():
        found, expected = vqae.decode_in_tiles(decoder, latent, rows, lambda tile: tile), decoder(latent)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "strides"), [((12, 16), (2, 2, 2)), ((8, 6, 4), (2, 2, (1, 1, 2), 1))])
def test_a_large_image_is_decoded_with_less_memory(grid, strides, monkeypatch):
    model = with_codes(small_model(len(grid), 3, (6, 7, 8, 9)[: len(strides)], strides))
    tokens = torch.randint(16, (2, *grid))
    with LargestTensor() as memory:
        whole = model.decode(tokens)
    monkeypatch.setattr(vqae, "LARGE", memory.numel // 2)
    monkeypatch.setattr(vqae, "TILE", memory.numel // 8)
    with LargestTensor() as memory_of_tiles:
        tiled = model.decode(tokens)
    assert torch.equal(tiled, whole)
    assert memory_of_tiles.numel < 0.5 * memory.numel
