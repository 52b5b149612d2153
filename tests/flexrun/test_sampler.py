"""Facts about how tokens are chosen, against a plain float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flexrun.request import SamplingParams
from flexrun.sampler import request_seed, sample, uniform

VOCAB = 97


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def reference_probabilities(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """One row's distribution, step by step: temperature, min_p, top_k, top_p."""
    scaled = logits.double().numpy() / params.temperature
    p = np.exp(scaled - scaled.max())
    p[p < params.min_p] = 0
    if params.top_k > 0:
        p[p < np.sort(p)[::-1][min(params.top_k, len(p)) - 1]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    likelier = np.cumsum(p[order]) - p[order]
    p[order[likelier >= params.top_p]] = 0
    return p / p.sum()


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10_000, top_p=0.5),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=0.7, min_p=0.02, top_k=20, top_p=0.8),
]


@pytest.mark.parametrize("params", PARAMS, ids=repr)
def test_sampling_matches_the_reference(params):
    """Each random number gives the token at which the reference's cumulative sum passes it."""
    randoms = [uniform(3, 0, position) for position in range(200)]
    logits = logits_of(len(randoms))
    tokens = sample(logits, [params] * len(randoms), randoms).tolist()
    for row, random, token in zip(logits, randoms, tokens):
        cumulative = np.cumsum(reference_probabilities(row, params))
        below = cumulative[token - 1] if token else 0.0
        assert below - 1e-6 <= random <= cumulative[token] + 1e-6


@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[9]], ids=["plain", "truncated"])
def test_frequencies_follow_the_distribution(params):
    """Over 20 000 draws the frequencies pass a chi-square test (fixed seed)."""
    draws = 20_000
    logits = logits_of(1, vocab=12).expand(draws, 12)
    randoms = [uniform(11, 0, position) for position in range(draws)]
    tokens = sample(logits, [params] * draws, randoms)
    seen = np.bincount(tokens.numpy(), minlength=12)
    expected = reference_probabilities(logits[0], params) * draws
    assert seen[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((seen[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4  # far beyond the 99.9 % quantile


def test_greedy_is_argmax_without_copies():
    """Greedy rows get the first of the largest logits, in any float type."""
    logits = logits_of(5)
    logits[2, 10] = logits[2, 20] = 100
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tokens = sample(logits.to(dtype), [SamplingParams(temperature=0)] * 5, [0.0] * 5)
        assert torch.equal(tokens, logits.to(dtype).argmax(dim=-1))
        assert tokens[2] == 10


def test_rows_do_not_depend_on_each_other():
    """A row's token is the same alone, in any batch, and whoever is beside it."""
    params = [PARAMS[i % len(PARAMS)] for i in range(40)] + [SamplingParams(temperature=0)] * 3
    logits = logits_of(len(params), seed=5, vocab=1000)
    randoms = [uniform(1, 0, i) for i in range(len(params))]
    together = sample(logits, params, randoms).tolist()
    alone = [int(sample(logits[i : i + 1], [params[i]], [randoms[i]])) for i in range(len(params))]
    assert together == alone
    order = torch.randperm(len(params), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits[order], [params[i] for i in order], [randoms[i] for i in order])
    assert shuffled.tolist() == [together[i] for i in order]


def test_rows_are_drawn_in_chunks(monkeypatch):
    """Bounding the workspace does not change a token."""
    logits, params = logits_of(9), [PARAMS[6]] * 9
    whole = sample(logits, params, [0.4] * 9)
    monkeypatch.setattr("flexrun.sampler._CHUNK", 2 * VOCAB)
    assert torch.equal(sample(logits, params, [0.4] * 9), whole)


def test_caller_keeps_its_logits():
    """Sampling does not write into the logits it is given."""
    logits = logits_of(3)
    copy = logits.clone()
    sample(logits, [PARAMS[9]] * 3, [0.5] * 3, banned=[(1,), (), ()])
    assert torch.equal(logits, copy)


def test_tokens_tied_with_the_last_kept_one_are_kept():
    """top_k never prefers one of two equally likely tokens."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, -5.0]])
    params = SamplingParams(top_k=2)
    seen = {int(sample(logits, [params], [r])) for r in np.linspace(0, 0.999, 50)}
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0, 1e30])
def test_banned_tokens_are_never_chosen(temperature):
    """A banned token is not chosen at any temperature; ids beyond the vocabulary do not matter."""
    logits = logits_of(2)
    best = int(logits[0].argmax())
    params = [SamplingParams(temperature=temperature)] * 2
    for random in (0.0, 0.3, 0.999999):
        tokens = sample(logits, params, [random] * 2, banned=[(best, 10**9), ()])
        assert 0 <= int(tokens[0]) < VOCAB
        assert int(tokens[0]) != best


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), PARAMS[0], PARAMS[9]])
def test_logits_that_are_not_finite_are_marked(bad, params):
    """A row with NaN or infinity gives -1, and its neighbours are unharmed."""
    logits = logits_of(3)
    good = sample(logits, [params] * 3, [0.5] * 3).tolist()
    logits[1, 4] = bad
    assert sample(logits, [params] * 3, [0.5] * 3).tolist() == [good[0], -1, good[2]]


def test_extreme_random_numbers_stay_in_the_vocabulary():
    """The smallest and the largest random number give a token of non-zero probability."""
    logits = torch.full((2, 50), -math.inf)
    logits[:, 30] = 1.0
    tokens = sample(logits, [SamplingParams()] * 2, [0.0, 1 - 2**-53])
    assert tokens.tolist() == [30, 30]


def test_random_numbers_are_a_pure_function():
    """The same seed, sample and position give the same number; any change gives another."""
    first = uniform(1, 2, 3)
    assert first == uniform(1, 2, 3)
    assert len({first, uniform(0, 2, 3), uniform(1, 0, 3), uniform(1, 2, 4)}) == 4
    assert 0 <= uniform(-1, 0, 0) < 1
    assert 0 <= uniform(10**30, 0, 0) < 1
    numbers = [uniform(7, 0, position) for position in range(2000)]
    assert abs(np.mean(numbers) - 0.5) < 0.02


def test_requests_without_a_seed_differ():
    """A request's own seed is used as it is; otherwise engine seed and index decide."""
    assert request_seed(SamplingParams(seed=5), 1, 2) == 5
    derived = {request_seed(SamplingParams(), seed, i) for seed in range(3) for i in range(3)}
    assert len(derived) == 9
