"""A KV cache in groups of 4 bits: the tokens of transformers with such a cache, on every tier."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from compression import groupwise
from compression.expansion import quantize_unchecked
from compression.rotation import rotated
from compression.spec import GroupFormat
from flexrun import LLM, SamplingParams, kv_setup
from flexrun.plan import SweepPlan
from offload.links import Link
from offload.tiers import Tier
from policy_search.policy import Policy
from tests.end_to_end.harness import engine_of, generate, run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.end_to_end.test_preemption import preempt_at_random

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated"),  # its name until 5.13
]

NEW_TOKENS = 12
PAGE = 8
PROMPTS = [list(text.encode()) for text in ragged_prompts(14, longest=12)]
FORMAT = GroupFormat(4, 64)
PLACES = (
    ("cpu", "device=100", "auto"),
    ("cpu", "device=40,disk=60", "auto"),
    ("emulated", "device=100", "auto"),
    ("emulated", "host=100", "device"),
    ("emulated", "host=100", "host"),
    ("emulated", "disk=100", "auto"),
    ("emulated", "device=30,host=40,disk=30", "auto"),
)


def settings(device: str, kv_cache: str, attention: str, **more: Any) -> dict[str, Any]:
    """Whole prompts in one chunk: what is cut elsewhere attends to other packed pages."""
    batch = {"num_micro_batches": 3, "micro_batch_rows": 400, "max_rows": 2000}
    policy = Policy(page_tokens=PAGE, max_sequences=20, weights=Policy().weights)
    where = {"device": device, "kv_cache": kv_cache, "attention": attention, "dtype": "float32"}
    return {"policy": policy, "kv_bits": 4, **batch, **where, **more}


class PackingCache(DynamicCache):  # type: ignore[misc]
    """Pages but the first one become what their codes stand for after the step that fills them.

    Without the mean of the first page's keys, or values, but for the first token's.
    """

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        before = self.get_seq_length(layer_idx)
        seen = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer, end = self.layers[layer_idx], before + key_states.shape[2]
        full = slice(max(PAGE, before // PAGE * PAGE), end // PAGE * PAGE)
        if full.start < full.stop:
            layer.keys, layer.values = (side.clone() for side in seen)
            for side in (layer.keys, layer.values):
                centre = side[:, :, 1:PAGE].mean(2, keepdim=True)
                side[:, :, full] = packed_and_back(side[:, :, full] - centre) + centre
        return seen


def packed_and_back(values: torch.Tensor) -> torch.Tensor:
    rows = rotated(values).reshape(-1, values.shape[-1])
    packed = quantize_unchecked(rows, FORMAT)
    expanded = groupwise.expand(packed, FORMAT, rows.shape[1], torch.float32)
    return rotated(expanded).view(values.shape)


@torch.inference_mode()
def packing_tokens(directory: Path, *, shared: bool = False) -> list[list[int]]:
    """Greedy continuations by transformers with a `PackingCache`.

    Of the whole prompt at once, or of what one sample shares with another one, and then the rest:
    all but the last token, or full pages, if the first sample's last page was packed.
    """
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    results = []
    for prompt in PROMPTS:
        cache, ids = PackingCache(), torch.tensor([prompt])
        if shared:
            split = len(prompt) - 1
            split = split if len(prompt) % PAGE else split // PAGE * PAGE
            model(ids[:, :split], past_key_values=cache, use_cache=True)
            ids = ids[:, split:]
        tokens: list[int] = []
        while len(tokens) < NEW_TOKENS and 0 not in tokens:
            logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
            tokens.append(int(logits.argmax()))
            ids = torch.tensor([tokens[-1:]])
        results.append(tokens)
    return results


@pytest.fixture(scope="module")
def reference(tiny_llama_dir) -> list[list[int]]:
    return packing_tokens(tiny_llama_dir)


@pytest.mark.parametrize(("device", "kv_cache", "attention"), PLACES)
def test_tokens_are_those_of_a_packed_cache(
    tiny_llama_dir, tmp_path, reference, device, kv_cache, attention
):
    """Wherever pages live and are attended to, and they differ from those of a plain cache."""
    chosen = settings(device, kv_cache, attention, offload_dir=tmp_path)
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **chosen)
    assert done.tokens == reference
    assert max(done.micro_batches) >= 3
    assert reference != greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


def test_samples_of_a_prompt_share_packed_pages(tiny_llama_dir, reference):
    """They begin with exact copies of the first and the newest page."""
    with LLM(tiny_llama_dir, **settings("cpu", "device=100", "auto")) as llm:
        given = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, n=3)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:6]]
        outputs = llm.generate(prompts, given, use_tqdm=False)
    found = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
    shared = packing_tokens(tiny_llama_dir, shared=True)
    assert found == [[first, other, other] for first, other in zip(reference[:6], shared)]


def test_links_carry_packed_pages(tiny_llama_dir):
    """Every full page but the first, once a sweep, in packed bytes; it goes to HOST once."""
    chosen = settings("emulated", "host=100", "device", speculation="off")
    with LLM(tiny_llama_dir, **chosen) as llm:
        done = generate(llm, PROMPTS, NEW_TOKENS, ignore_eos=True)
        layers = engine_of(llm)._runtime.model.attention
        moved = done.summary["bytes_by_kind"]
    page = sum(
        PAGE * s.kv_heads * (FORMAT.row_bytes(s.key_dim) + FORMAT.row_bytes(s.value_dim))
        for s in layers
    )
    spans = [span for plan in done.plans for span in plan.spans]
    read = sum(max(0, span.start // PAGE - 1) for span in spans)
    kept = sum(max(1, s.end // PAGE) - max(1, s.start // PAGE) for s in spans)
    assert moved[str(Link.HOST_TO_DEVICE)]["kv"] == read * page
    assert moved[str(Link.DEVICE_TO_HOST)]["kv"] == kept * page
    assert min(read, kept) > 50


@pytest.mark.parametrize("kv_cache", ["device=100", "host=60,disk=40"])
def test_sixteen_bits_change_nothing(tiny_llama_dir, tmp_path, kv_cache):
    """Said or unsaid, they are the same tokens and bytes."""
    chosen = settings("emulated", kv_cache, "device", offload_dir=tmp_path)
    runs = [run(tiny_llama_dir, PROMPTS, 4, **chosen | {"kv_bits": bits}) for bits in (16, None)]
    assert runs[0].tokens == runs[1].tokens == greedy_tokens(tiny_llama_dir, PROMPTS, 4, [0])
    kinds = [done.summary["bytes_by_kind"] for done in runs]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_sequences_come_back_from_the_swap_tier(
    tiny_llama_dir, tmp_path, monkeypatch, reference, device
):
    """They go on as if nothing had happened: the first page is where it was."""
    pages = {Tier.DEVICE: 200, Tier.HOST: 0, Tier.DISK: 0}
    monkeypatch.setattr(kv_setup, "kv_pages", lambda *_: dict(pages))
    draw = random.Random(0)
    with LLM(tiny_llama_dir, **settings(device, "device=100", "auto", offload_dir=tmp_path)) as llm:
        scheduler = engine_of(llm)._runtime.scheduler
        next_sweep, pools = scheduler.next_sweep, scheduler.pools

        def broken_into(drafts: Mapping[int, int] | None = None) -> SweepPlan:
            victims = [
                number
                for number, progress in scheduler.running.items()
                # Rows of a prompt that are computed again see packed pages instead of exact ones.
                if progress.computed // PAGE * PAGE >= len(PROMPTS[number])
                and pools.can_swap_out(number)
            ]
            if victims and len(scheduler.running) > 1:
                scheduler.preempt(draw.choice(victims), swap=True)
            return next_sweep(drafts)

        monkeypatch.setattr(scheduler, "next_sweep", broken_into)
        done = generate(llm, PROMPTS, NEW_TOKENS)
        assert len(pools._free_tails) == pools.tails
    assert done.summary["swaps"] == done.summary["preemptions"] > 3
    assert done.tokens == reference


def test_sequences_that_are_computed_again_end(tiny_llama_dir, tmp_path, monkeypatch):
    """They may choose other tokens, but as many, and all tails are given back."""
    pages = {Tier.DEVICE: 60, Tier.HOST: 0, Tier.DISK: 0}
    monkeypatch.setattr(kv_setup, "kv_pages", lambda *_: dict(pages))
    chosen = settings("emulated", "device=100", "auto", offload_dir=tmp_path)
    with LLM(tiny_llama_dir, **chosen) as llm:
        preempt_at_random(llm, random.Random(0), [False])
        done = generate(llm, PROMPTS, NEW_TOKENS, ignore_eos=True)
        pools = engine_of(llm)._runtime.pools
        assert len(pools._free_tails) == pools.tails
    assert done.summary["preemptions"] > 5
    assert [len(tokens) for tokens in done.tokens] == [NEW_TOKENS] * len(PROMPTS)
