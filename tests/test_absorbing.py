"""The absorbing process: its contracts, its bound and its sampler, against a toy whose joint is known exactly."""

import itertools
import math

import pytest
import torch

from pairdiff_core import absorbing

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
    """The perfect denoiser: conditionals of every token given the ones that are not masked."""

    def predict(tokens):
        known = tokens[:, None] != MASK  # (N, 1, L)
        fits = ((tokens[:, None] == sequences) | ~known).all(2)  # (N, S)
        weights = fits * joint  # (N, S)
        one_hot = torch.nn.functional.one_hot(sequences, CODES).double()  # (S, L, K)
        chances = torch.einsum("ns,slk->nlk", weights, one_hot)
        return (chances / chances.sum(-1, keepdim=True)).clamp_min(1e-300).log()

    return predict


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
    """With exact conditionals every order of revealing gives the same likelihood, so the bound is tight."""
    expected = -joint.log2()  # bits of each sequence
    found = (
        sum(absorbing.bits_per_token(exact, sequences, MASK, seeded(s), draws=LENGTH) for s in range(400))
        / 400
    )
    torch.testing.assert_close((joint * found).sum() * LENGTH, (joint * expected).sum(), atol=0.03, rtol=0)


def test_the_bound_of_a_clueless_denoiser_is_log2_of_the_codebook():
    tokens = torch.randint(0, CODES, (5, LENGTH))
    found = absorbing.bits_per_token(lambda x: torch.zeros(*x.shape, CODES), tokens, MASK, seeded())
    torch.testing.assert_close(found, torch.full((5,), math.log2(CODES)))


def test_the_reweighted_loss_of_a_clueless_denoiser():
    """E[(1 - t) t] = 1/6 of the tokens, each at log2(K) bits."""
    tokens = torch.zeros(50_000, LENGTH, dtype=torch.long)
    t = torch.rand(len(tokens), generator=seeded(1))
    state = absorbing.mask_tokens(tokens, t, MASK, seeded())
    found = absorbing.reweighted_loss(lambda x: torch.zeros(*x.shape, CODES), tokens, state, t)
    assert float(found) == pytest.approx(math.log2(CODES) / 6, rel=0.02)


def total_variation(samples, joint):
    index = (samples * torch.tensor([CODES**i for i in reversed(range(LENGTH))])).sum(1)
    return (torch.bincount(index, minlength=len(joint)) / len(samples) - joint).abs().sum() / 2


def test_one_token_at_a_time_samples_the_joint(joint, exact):
    """With many more steps than tokens hardly two are revealed together, and the sampler is exact."""
    number = 4_000
    samples = absorbing.sample(exact, number, LENGTH, MASK, seeded(), steps=256)
    noise = 0.5 * math.sqrt(2 / math.pi) * (joint * (1 - joint) / number).sqrt().sum()  # of a perfect sampler
    assert total_variation(samples, joint) < noise + 0.02


def test_all_tokens_at_once_samples_the_marginals_only(joint, exact):
    """One step reveals all tokens independently: right marginals, wrong joint. The published sampler's price."""
    samples = absorbing.sample(exact, 20_000, LENGTH, MASK, seeded(), steps=1)
    marginals = exact(torch.full((1, LENGTH), MASK))[0].exp()  # (L, K)
    found = torch.nn.functional.one_hot(samples, CODES).double().mean(0)
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
    ("schedule", "t"), [("even", lambda k: 1 - k / 8), ("cosine", lambda k: math.cos(k * math.pi / 16))]
)
def test_after_each_step_as_many_are_masked_as_the_schedule_says(schedule, t):
    empty = torch.full((2_000, 50), MASK)
    steps = absorbing.reveal(
        lambda x: torch.zeros(*x.shape, CODES), empty, MASK, seeded(), steps=8, schedule=schedule
    )
    left = [float((tokens == MASK).double().mean()) for tokens in steps]
    assert left == pytest.approx([t(k) for k in range(1, 9)], abs=0.01)
    assert left[-1] == 0


def test_an_even_schedule_reveals_with_one_over_the_steps_left(exact):
    start, random, plain = torch.full((64, LENGTH), MASK), seeded(), []
    for left in range(6, 0, -1):
        now = (start == MASK) & (torch.rand(start.shape, generator=random) < 1 / left)
        start = start.clone()
        start[now] = absorbing.draw_tokens(exact(start)[now], 1.0, random)
        plain.append(start)
    empty = torch.full((64, LENGTH), MASK)
    assert all(map(torch.equal, plain, absorbing.reveal(exact, empty, MASK, seeded(), steps=6)))


def test_a_slow_start_samples_the_joint_as_well(joint, exact):
    number = 4_000
    samples = absorbing.sample(exact, number, LENGTH, MASK, seeded(), steps=256, schedule="cosine")
    noise = 0.5 * math.sqrt(2 / math.pi) * (joint * (1 - joint) / number).sqrt().sum()
    assert total_variation(samples, joint) < noise + 0.02


def test_an_unknown_schedule_is_named(exact):
    with pytest.raises(ValueError, match="even, cosine, not 'sine'"):
        absorbing.sample(exact, 1, LENGTH, MASK, seeded(), schedule="sine")


def test_temperature_sharpens_as_the_formula_says():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(100_000, 3)
    for temperature in (0.5, 1.0, 2.0):
        drawn = absorbing.draw_tokens(logits, temperature, seeded())
        expected = (logits[0] / temperature).softmax(0)
        torch.testing.assert_close(
            torch.bincount(drawn, minlength=3) / len(drawn), expected, atol=0.01, rtol=0
        )


def test_rare_tokens_keep_their_chance():
    """Gumbel noise in 32 bit cannot draw what is rarer than about 1 in 10^7; 64 bit can, and does at 1 in 10^4."""
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


def test_the_published_denoiser_has_28_million_parameters():
    with torch.device("meta"):
        denoiser = absorbing.Denoiser(1024, (16, 13, 16), layers=12, width=512, heads=16, feed_forward=1024)
    assert round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6, 1) == 28.0


@pytest.mark.parametrize("grid, width", [((6, 5), 32), ((4, 3, 4), 50)])
def test_places_that_are_near_have_codes_that_are_near(grid, width):
    code = absorbing.place_code(grid, width)
    places = torch.cartesian_prod(*[torch.arange(size) for size in grid]).float()
    assert code.shape == (math.prod(grid), width)
    assert torch.cdist(code, code)[~torch.eye(len(code), dtype=torch.bool)].min() > 0.1, (
        "no two places look the same"
    )
    steps, distance = torch.cdist(places, places), torch.cdist(code, code)
    assert distance[steps == 1].mean() < distance[steps == 2].mean() < distance[steps > 3].mean()


def test_the_denoiser_learns_a_toy_joint(joint, sequences):
    """Trained by the re-weighted loss on samples of the toy, its bound comes near the entropy."""
    torch.manual_seed(0)
    denoiser = absorbing.Denoiser(CODES, (LENGTH,), layers=2, width=32, heads=2, feed_forward=64)
    adam, generator = torch.optim.Adam(denoiser.parameters(), 3e-3), seeded()
    for _ in range(300):
        batch = sequences[torch.multinomial(joint, 256, replacement=True, generator=generator)]
        t = torch.rand(256, generator=generator)
        state = absorbing.mask_tokens(batch, t, MASK, generator)
        loss = absorbing.reweighted_loss(denoiser, batch, state, t)
        adam.zero_grad()
        loss.backward()
        adam.step()
    entropy = -(joint * joint.log2()).sum() / LENGTH
    batch = sequences[torch.multinomial(joint, 4096, replacement=True, generator=generator)]
    bits = absorbing.bits_per_token(denoiser.eval(), batch, MASK, generator, draws=4).mean()
    assert entropy - 0.05 < bits < entropy + 0.1
    assert bits < 0.75 * math.log2(CODES)


def test_another_length_is_refused():
    denoiser = absorbing.Denoiser(CODES, (LENGTH,), layers=1, width=8, heads=1, feed_forward=8)
    with pytest.raises(ValueError, match="has 4 tokens, got 5"):
        denoiser(torch.zeros(1, 5, dtype=torch.long))


def test_without_convolutions_it_is_the_plain_transformer():
    torch.manual_seed(0)
    plain = absorbing.Denoiser(5, (3, 4), 1, 16, 2, 16).eval()
    tokens = torch.randint(0, 6, (2, 12))
    torch.testing.assert_close(plain(tokens), plain.head(plain.blocks(plain.token(tokens) + plain.position)))


@pytest.mark.parametrize("layers", [0, 1])
def test_convolutions_see_neighbours_and_nothing_else_before_the_transformer(layers):
    torch.manual_seed(0)
    model = absorbing.Denoiser(5, (9, 8), layers, 16, 2, 16, convolutions=1).eval()
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
    else:
        # two convolutions of 3 x 3
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 2, 6)


def test_convolutions_start_as_the_identity():
    torch.manual_seed(0)
    with_blocks = absorbing.Denoiser(5, (4, 4), 1, 16, 2, 16, convolutions=2)
    without = absorbing.Denoiser(5, (4, 4), 1, 16, 2, 16)
    without.load_state_dict({k: v for k, v in with_blocks.state_dict().items() if "convolutions" not in k})
    tokens = torch.randint(0, 6, (2, 16))
    torch.testing.assert_close(with_blocks(tokens), without(tokens))


def encoder_layers():
    """PyTorch's and ours, with the same weights."""
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    ours = absorbing.EncoderLayer(32, 4, 64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_is_that_of_pytorch(training):
    theirs, ours = (layer.double().train(training) for layer in encoder_layers())
    seen = torch.randn(2, 15, 32, dtype=torch.float64, generator=seeded())
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(seen), theirs(seen))


@pytest.mark.parametrize("bfloat16", [True, False])
def test_sampling_writes_down_no_table_of_attention(bfloat16):
    in_blocks, as_table = "_scaled_dot_product_flash_attention_for_cpu", "_transformer_encoder_layer_fwd"
    attention = []
    for layer in encoder_layers():
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, bfloat16),
            torch.profiler.profile() as done,
        ):
            layer.eval()(torch.zeros(1, 300, 32))
        attention.append(
            {in_blocks, as_table} & {event.key.removeprefix("aten::") for event in done.key_averages()}
        )
    theirs, ours = attention
    assert ours == {in_blocks}
    assert theirs == {as_table}, "where PyTorch's no longer does so, ours may go"
