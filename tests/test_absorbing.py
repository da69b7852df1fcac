"""Absorbing diffusion: its functions, its bound and its sampler, on a toy problem with a known joint distribution."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from pairdiff_core import absorbing
from pairdiff_core.profiles import get_profile

CODES, LENGTH = 3, 4
MASK = CODES


@pytest.fixture(scope="module")
def joint():
    """A random joint distribution over all CODES ** LENGTH sequences, strongly correlated."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn([CODES] * LENGTH, generator=generator, dtype=torch.float64)).flatten().softmax(0)


@pytest.fixture(scope="module")
def sequences():
    return torch.tensor(list(itertools.product(range(CODES), repeat=LENGTH)))


@pytest.fixture(scope="module")
def exact(joint, sequences):
    """The perfect denoiser: the conditional distribution of each token given those that are not masked."""

    def predict(tokens):
        known = tokens[:, None] != MASK  # (N, 1, L)
        fits = ((tokens[:, None] == sequences) | ~known).all(2)  # (N, S)
        weights = fits * joint  # (N, S)
        chances = torch.einsum("ns,slk->nlk", weights, one_hot(sequences, CODES).double())  # (N, L, K)
        return (chances / chances.sum(-1, keepdim=True)).clamp_min(1e-300).log()

    return predict


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clueless(tokens):
    return torch.zeros(*tokens.shape, CODES)


def small_denoiser(grid, **sizes):
    torch.manual_seed(0)
    few = {"layers": 1, "width": 16, "heads": 2, "feed_forward": 16, "convolutions": 0, "given": 0.0}
    return absorbing.Denoiser(replace(get_profile("quick").denoiser, **few | sizes), CODES, grid).eval()


def test_every_token_is_masked_independently_with_probability_t():
    tokens = torch.zeros(20_000, 8, dtype=torch.long)
    t = torch.full((len(tokens),), 0.3)
    state = absorbing.mask_tokens(tokens, t, MASK, seeded())
    assert torch.equal(state.tokens == MASK, state.masked)
    assert state.masked.float().mean() == pytest.approx(0.3, abs=0.01)
    correlation = torch.corrcoef(state.masked.float().T) - torch.eye(8)
    assert correlation.abs().max() < 0.03


def test_nothing_is_masked_at_0_and_everything_at_1():
    tokens = torch.randint(0, CODES, (6, LENGTH))
    state = absorbing.mask_tokens(tokens, torch.tensor([0.0, 1.0]).repeat(3), MASK, seeded())
    assert torch.equal(state.tokens[::2], tokens[::2])
    assert torch.all(state.tokens[1::2] == MASK)


def test_the_bound_of_the_perfect_denoiser_is_the_entropy(joint, sequences, exact):
    """With exact conditionals, all orders of revealing have the same likelihood, so the bound is tight."""
    expected = -joint.log2()  # bits of each sequence
    many = sequences.repeat(20, 1)
    found = absorbing.bits_per_token(exact, many, MASK, seeded(), draws=4 * LENGTH).reshape(20, -1).mean(0)
    torch.testing.assert_close((joint * found).sum() * LENGTH, (joint * expected).sum(), atol=0.03, rtol=0)


def test_the_bound_of_a_clueless_denoiser_is_log2_of_the_codebook():
    tokens = torch.randint(0, CODES, (5, LENGTH))
    found = absorbing.bits_per_token(clueless, tokens, MASK, seeded())
    torch.testing.assert_close(found, torch.full((5,), math.log2(CODES)))


def test_the_reweighted_loss_of_a_clueless_denoiser():
    """E[(1 - t) t] = 1/6 of the tokens, each at log2(K) bits."""
    tokens = torch.zeros(50_000, LENGTH, dtype=torch.long)
    t = torch.rand(len(tokens), generator=seeded(1))
    state = absorbing.mask_tokens(tokens, t, MASK, seeded())
    found = absorbing.reweighted_loss(clueless, tokens, state, t)
    assert float(found) == pytest.approx(math.log2(CODES) / 6, rel=0.02)


def total_variation(samples, joint):
    index = (samples * torch.tensor([CODES**i for i in reversed(range(LENGTH))])).sum(1)
    return (torch.bincount(index, minlength=len(joint)) / len(samples) - joint).abs().sum() / 2


@pytest.mark.parametrize("schedule", ["uniform", "cosine"])
def test_one_token_at_a_time_samples_the_joint(joint, exact, schedule):
    """With many more steps than tokens, two are rarely revealed together, and the sampler is nearly exact."""
    number = 4_000
    samples = absorbing.sample(exact, number, LENGTH, MASK, seeded(), steps=128, schedule=schedule)
    noise = 0.5 * math.sqrt(2 / math.pi) * (joint * (1 - joint) / number).sqrt().sum()  # of a perfect sampler
    assert total_variation(samples, joint) < noise + 0.02


def test_all_tokens_at_once_samples_the_marginals_only(joint, exact):
    """One step reveals all tokens independently: the marginals are right, but the joint distribution is not."""
    samples = absorbing.sample(exact, 20_000, LENGTH, MASK, seeded(), steps=1)
    marginals = exact(torch.full((1, LENGTH), MASK))[0].exp()  # (L, K)
    found = one_hot(samples, CODES).double().mean(0)
    torch.testing.assert_close(found, marginals, atol=0.02, rtol=0)
    assert total_variation(samples, joint) > 0.1


def test_a_token_once_revealed_never_changes(exact):
    start = torch.full((64, LENGTH), MASK)
    start[:, 1] = 2
    before = start
    for after in absorbing.reveal(exact, start, MASK, seeded(), steps=10):
        known = before != MASK
        assert torch.equal(after[known], before[known])
        before = after
    assert torch.all(before != MASK)
    assert torch.all(start[:, [0, 2, 3]] == MASK), "the start is left as it was"


@pytest.mark.parametrize(
    ("schedule", "t"), [("uniform", lambda k: 1 - k / 8), ("cosine", lambda k: math.cos(k * math.pi / 16))]
)
def test_after_each_step_as_many_are_masked_as_the_schedule_says(schedule, t):
    empty = torch.full((2_000, 50), MASK)
    steps = absorbing.reveal(clueless, empty, MASK, seeded(), steps=8, schedule=schedule)
    left = [float((tokens == MASK).double().mean()) for tokens in steps]
    assert left == pytest.approx([t(k) for k in range(1, 9)], abs=0.01)
    assert left[-1] == 0


def test_an_unknown_schedule_is_named(exact):
    with pytest.raises(ValueError, match="uniform, cosine, not 'sine'"):
        absorbing.sample(exact, 1, LENGTH, MASK, seeded(), schedule="sine")


def test_temperature_sharpens_as_the_formula_says():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(100_000, 3)
    for temperature in (0.5, 1.0, 2.0):
        drawn = absorbing.draw_tokens(logits, temperature, seeded())
        expected = (logits[0] / temperature).softmax(0)
        torch.testing.assert_close(torch.bincount(drawn, minlength=3) / len(drawn), expected, atol=0.01, rtol=0)


def test_rare_tokens_keep_their_chance():
    """Gumbel noise in 32 bit cannot draw tokens rarer than about 1 in 10^7; here 64 bit draws one of 1 in 10^4."""
    logits = torch.tensor([[0.0, math.log(1e-4)]]).expand(1_000_000, 2)
    drawn = absorbing.draw_tokens(logits, 1.0, seeded())
    assert int(drawn.sum()) == pytest.approx(100, abs=40)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        absorbing.draw_tokens(torch.zeros(1, 3), 0.0, seeded())


def test_the_same_seed_gives_the_same_sample(exact):
    one = absorbing.sample(exact, 50, LENGTH, MASK, seeded(3), steps=8)
    assert torch.equal(one, absorbing.sample(exact, 50, LENGTH, MASK, seeded(3), steps=8))
    assert not torch.equal(one, absorbing.sample(exact, 50, LENGTH, MASK, seeded(4), steps=8))


@pytest.mark.parametrize("grid, width", [((6, 5), 32), ((4, 3, 4), 50)])
def test_positions_that_are_near_have_codes_that_are_near(grid, width):
    code = absorbing.position_code(grid, width)
    positions = torch.cartesian_prod(*[torch.arange(size) for size in grid]).float()
    assert code.shape == (math.prod(grid), width)
    steps, distance = torch.cdist(positions, positions), torch.cdist(code, code)
    assert distance[steps > 0].min() > 0.1, "no two look the same"
    assert distance[steps == 1].mean() < distance[steps == 2].mean() < distance[steps > 3].mean()


def test_the_denoiser_learns_a_toy_joint(joint, sequences):
    """After training on samples of the toy problem, the bound is close to the entropy; what is given lowers it."""
    denoiser = small_denoiser((LENGTH,), layers=2, width=32, feed_forward=64, given=0.5).train()
    adam, generator = torch.optim.Adam(denoiser.parameters(), 3e-3), seeded()
    for _ in range(400):
        tokens = sequences[torch.multinomial(joint, 256, replacement=True, generator=generator)]
        t = torch.rand(256, generator=generator)
        hidden = tokens.masked_fill(torch.rand(256, 1, generator=generator) < 0.5, MASK)  # all that is to be found
        state = absorbing.mask_tokens(tokens, t, MASK, generator)
        loss = absorbing.training_loss(denoiser, absorbing.Batch(tokens, t, state, hidden))["loss"]
        adam.zero_grad()
        loss.backward()
        adam.step()
    entropy = -(joint * joint.log2()).sum() / LENGTH
    bits = (joint * absorbing.bits_per_token(denoiser.eval(), sequences, MASK, generator, draws=32)).sum()
    assert entropy - 0.05 < bits < entropy + 0.1
    assert bits < 0.75 * math.log2(CODES)
    with torch.no_grad():
        masked, unknown = torch.full_like(sequences, MASK), torch.full_like(sequences, MASK)
        assert torch.equal(denoiser(masked, given=unknown), denoiser(masked)), "MASK says nothing"
        found = denoiser(masked, given=sequences).argmax(2)
    assert (joint * (found == sequences).double().mean(1)).sum() > 0.95


def test_only_a_denoiser_that_was_trained_with_fixed_images_is_given_one():
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="trained without fixed images"):
        small_denoiser((2, 2))(tokens, given=tokens)


def test_each_training_sequence_is_masked_by_its_own_generator():
    tokens = torch.randint(0, CODES, (3, 50), dtype=torch.int16)
    fixed = tokens.flip(1)
    together = absorbing.training_batch(tokens, MASK, [seeded(1), seeded(2), seeded(3)], fixed, 0.5)
    alone = absorbing.training_batch(tokens[1:2], MASK, [seeded(2)], fixed[1:2], 0.5)
    for part, expected in zip((together, together.state), (alone, alone.state), strict=True):
        for name in ("tokens", "t", "masked", "given"):
            if hasattr(part, name):
                assert torch.equal(getattr(part, name)[1:2], getattr(expected, name))
    assert len(together.t.unique()) == 3, "each has its own t"


def test_a_share_of_the_fixed_images_is_shown():
    tokens = torch.zeros(400, 3, dtype=torch.int16)
    given = absorbing.training_batch(tokens, MASK, [seeded(each) for each in range(400)], tokens, 0.25).given
    shown = (given == 0).all(1)
    assert torch.all(shown | (given == MASK).all(1)) and 0.2 < shown.double().mean() < 0.3


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="has 4 tokens, got 5"):
        small_denoiser((LENGTH,))(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize("layers", [0, 1])
def test_convolutions_see_neighbours_and_nothing_else_before_the_transformer(layers):
    model = small_denoiser((9, 8), layers=layers, convolutions=1)
    with torch.no_grad():
        model.convolutions[0].norm1 = model.convolutions[0].norm2 = torch.nn.Identity()  # they see everything
        model.convolutions[0].conv2.conv.weight.normal_()
    tokens = torch.zeros(1, 72, dtype=torch.long)
    changed = tokens.clone()
    changed[0, torch.arange(72).reshape(9, 8)[4, 4]] = 3
    difference = (model(tokens) != model(changed)).any(-1).reshape(9, 8)
    rows, columns = difference.nonzero().T
    if layers:
        assert difference.all()
    else:  # two convolutions of 3 x 3
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 2, 6)


def test_convolutions_start_as_the_identity():
    with_blocks, without = small_denoiser((4, 4), convolutions=2), small_denoiser((4, 4))
    without.load_state_dict({k: v for k, v in with_blocks.state_dict().items() if "convolutions" not in k})
    tokens = torch.randint(0, CODES + 1, (2, 16))
    torch.testing.assert_close(with_blocks(tokens), without(tokens))


@pytest.mark.parametrize("bfloat16", [True, False])
def test_sampling_writes_down_no_table_of_attention(bfloat16, monkeypatch):
    in_blocks, as_table = "_scaled_dot_product_flash_attention_for_cpu", "_transformer_encoder_layer_fwd"
    model, tokens = small_denoiser((15, 20)), torch.zeros(1, 300, dtype=torch.long)

    def attention():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, bfloat16), torch.profiler.profile() as done:
            model(tokens)
        return {in_blocks, as_table} & {event.key.removeprefix("aten::") for event in done.key_averages()}

    assert attention() == {in_blocks}
    monkeypatch.setattr(absorbing, "no_fast_path", nullcontext)
    assert attention() == {as_table}, "where PyTorch no longer does so, no_fast_path may go"
