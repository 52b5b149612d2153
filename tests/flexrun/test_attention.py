"""Facts about attention: the torch backend against a loop over rows and heads in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from flexrun.attention import prefill
from flexrun.attention.cpu import CpuAttention
from flexrun.attention.torch_ops import TorchAttention
from flexrun.paused_forward import AttentionOptions
from flexrun.plan import RowSpan
from offload.backend_cpu import CpuBackend
from offload.kv_cache import KVCache
from offload.pages import PagePools
from offload.tiers import MemoryAccount, Tier
from offload.transfer_engine import TransferEngine

KEY_DIM, VALUE_DIM = 6, 5


class Shape:
    """What one layer stores per token."""

    key_dim, value_dim = KEY_DIM, VALUE_DIM

    def __init__(self, kv_heads: int) -> None:
        self.kv_heads = kv_heads


OPTIONS = {
    "plain": AttentionOptions(scaling=0.4),
    "window": AttentionOptions(scaling=0.4, sliding_window=5),
    "chunk": AttentionOptions(scaling=0.4, chunk=4),
    "softcap": AttentionOptions(scaling=0.4, softcap=1.5),
    "sinks": AttentionOptions(scaling=0.4, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": AttentionOptions(
        scaling=1.3, sliding_window=7, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])
    ),
}


def brute_force(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: int, o: AttentionOptions
) -> torch.Tensor:
    """One row at position `at`, head by head: query [H, D], keys [S, K, D]; returns [H, V]."""
    seen = [
        position
        for position in range(at + 1)
        if (o.sliding_window is None or at - position < o.sliding_window)
        and (o.chunk is None or position // o.chunk == at // o.chunk)
    ]
    out = []
    for head in range(query.shape[0]):
        kv_head = head * keys.shape[1] // query.shape[0]
        scores = keys[seen, kv_head].double() @ query[head].double() * o.scaling
        if o.softcap is not None:
            scores = o.softcap * torch.tanh(scores / o.softcap)
        sink = 0.0 if o.sinks is None else math.exp(float(o.sinks[head]))
        weights = torch.exp(scores) / (torch.exp(scores).sum() + sink)
        out.append(weights @ values[seen, kv_head].double())
    return torch.stack(out)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Products this small are the fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rig:
    """Sequences with random keys and values in a paged cache."""

    def __init__(self, kv_heads: int, page_tokens: int, seed: int) -> None:
        self.backend = CpuBackend(MemoryAccount())
        self.transfers = TransferEngine(self.backend)
        # Two tiers, so that a micro-batch has rows in two pools.
        self.pools = PagePools({Tier.DEVICE: 120, Tier.HOST: 120}, page_tokens)
        self.cache = KVCache(
            [Shape(kv_heads)], torch.float32, self.pools, self.backend, self.transfers, 1
        )
        self.kv_heads = kv_heads
        self.random = torch.Generator().manual_seed(seed)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def fill(self, sequence: int, tokens: int) -> None:
        """Give a sequence its keys and values; those before its span go into the cache."""
        assert self.pools.allocate(sequence, tokens)
        shape = (tokens, self.kv_heads)
        self.keys[sequence] = torch.randn(*shape, KEY_DIM, generator=self.random)
        self.values[sequence] = torch.randn(*shape, VALUE_DIM, generator=self.random)

    def append(self, spans: list[RowSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the spans' keys and values into their pages; both as the model gives them."""
        key = torch.cat([self.keys[s.sequence][s.start : s.end] for s in spans]).transpose(0, 1)
        value = torch.cat([self.values[s.sequence][s.start : s.end] for s in spans])
        self.cache.begin([spans])
        self.cache.append(0, 0, key, value.transpose(0, 1))
        return key, value.transpose(0, 1)

    def check(self, spans: list[RowSpan], heads: int, options: AttentionOptions) -> None:
        """What attention gives for the spans is what the formula gives row by row."""
        before = [RowSpan(s.sequence, 0, s.start, False) for s in spans if s.start]
        if before:
            self.append(before)
        key, value = self.append(spans)
        rows = key.shape[1]
        query = torch.randn(heads, rows, KEY_DIM, generator=self.random)
        expected = torch.stack(
            [
                brute_force(query[:, row], *self.stored(span.sequence), position, options)
                for row, (span, position) in enumerate(
                    (span, position) for span in spans for position in range(span.start, span.end)
                )
            ]
        )
        for backend in (TorchAttention(), CpuAttention(threads=2)):
            state = backend.parts(query, key, value, self.cache.view(0, 0), options)
            out = state.finish(options.sinks, query.dtype)
            assert out.shape == (rows, heads, VALUE_DIM)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
            backend.close()

    def stored(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a sequence."""
        return self.keys[sequence], self.values[sequence]

    def close(self) -> None:
        self.transfers.close()
        self.cache.close()


def random_spans(rig: Rig, draw: random.Random, kind: str) -> list[RowSpan]:
    """Whole prompts, later chunks of prompts, single rows, or all of them mixed."""
    spans = []
    for sequence in range(7):
        tokens = draw.randint(1, 23)
        one = kind if kind != "mixed" else draw.choice(["prompts", "chunks", "decodes"])
        start = {"prompts": 0, "chunks": draw.randrange(tokens), "decodes": tokens - 1}[one]
        rig.fill(sequence, tokens)
        spans.append(RowSpan(sequence, start, tokens - start, wants_logits=True))
    return spans


@pytest.mark.parametrize("kind", ["prompts", "chunks", "decodes", "mixed"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("page_tokens", [1, 16])
def test_ragged_rows(kind, name, kv_heads, page_tokens):
    """Packed rows of ragged sequences attend to their own positions, under every option."""
    seed = list(OPTIONS).index(name) * 100 + kv_heads * 10 + page_tokens
    rig = Rig(kv_heads, page_tokens, seed)
    rig.check(random_spans(rig, random.Random(seed), kind), 4, OPTIONS[name])
    rig.close()


@pytest.mark.parametrize("name", ["window", "chunk", "sinks"])
@pytest.mark.parametrize("start", [0, 9])
def test_tiles_of_query_rows(monkeypatch, name, start):
    """A prompt that is cut into tiles of rows gives the same as one piece."""
    monkeypatch.setattr(prefill, "ROW_TILE", 3)
    monkeypatch.setattr(prefill, "KEY_TILE", 5)
    monkeypatch.setattr(prefill, "GATHERED", 8)
    rig = Rig(2, 4, seed=start)
    rig.fill(0, 20)
    rig.check([RowSpan(0, start, 20 - start, True)], 4, OPTIONS[name])
    rig.close()


def test_a_window_as_wide_as_the_text_hides_nothing():
    """A sliding window or a chunk that nobody reaches the end of gives plain attention."""
    for options in (
        replace(OPTIONS["plain"], sliding_window=12),
        replace(OPTIONS["plain"], chunk=12),
    ):
        rig = Rig(2, 4, seed=1)
        rig.fill(0, 12)
        spans = [RowSpan(0, 0, 12, True)]
        key, value = rig.append(spans)
        query = torch.randn(4, 12, KEY_DIM, generator=rig.random)
        groups = rig.cache.view(0, 0)
        plain, found = (
            TorchAttention().parts(query, key, value, groups, each).finish(None, query.dtype)
            for each in (OPTIONS["plain"], options)
        )
        assert torch.equal(found, plain)
        rig.close()
