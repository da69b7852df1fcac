"""Seeds that follow their purpose."""

import torch

from pairdiff_core.randomness import generator, seed_of


def test_each_purpose_has_a_seed_of_its_own_that_stays():
    seeds = [
        seed_of(seed, purpose, number)
        for seed in range(3)
        for purpose in ("warp", "mask")
        for number in range(50)
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "warp", 17) == 372442933, "the same in every process and version"
    torch.manual_seed(5)
    first = torch.rand(3, generator=generator(0, "warp", 17))
    torch.rand(9)
    assert torch.equal(first, torch.rand(3, generator=generator(0, "warp", 17)))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "warp", 18)))


def test_words_do_not_run_together():
    assert seed_of("a", "bc") != seed_of("ab", "c") and seed_of(1, 23) != seed_of(12, 3)
