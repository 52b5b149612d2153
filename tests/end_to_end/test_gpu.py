"""On a GPU: the same tokens, the same bytes, within the budget, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexrun import LLM, CapacityError
from flexrun.twin import random_twin
from offload.expansion import Expansion
from offload.slabs import Weight
from offload.tiers import Tier
from policy_search.policy import Policy
from tests.end_to_end import test_architectures
from tests.end_to_end.harness import SPLITS, cached_reference, engine_of, generate, run
from tests.end_to_end.reference import greedy_tokens, ragged_prompts
from tests.end_to_end.test_bytes import PAGE, counted, placeable, streamed_bytes
from tests.end_to_end.test_exact_real import smol_prompts
from tests.families import FAMILIES, config_of

pytestmark = pytest.mark.gpu

NEW_TOKENS = 8
PROMPTS = [list(text.encode()) for text in ragged_prompts(16, longest=7)]
MIB = 2**20


@pytest.fixture(scope="module")
def tiny_reference(tiny_llama_dir) -> list[list[int]]:
    """What transformers generates for `PROMPTS` on the CPU."""
    return greedy_tokens(tiny_llama_dir, PROMPTS, NEW_TOKENS, [0])


def settings(weights: str, kv_cache: str, micro_batches: int = 3, **more: Any) -> dict[str, Any]:
    cut = {"num_micro_batches": micro_batches, "micro_batch_rows": 48 // micro_batches}
    common = {"device": "cuda", "dtype": "float32", "weights": weights, "kv_cache": kv_cache}
    return common | cut | {"max_rows": 48, "max_sequences": 10} | more


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "kv_cache",
    ["device=100", "host=100", "device=50,host=50", "disk=100", "device=30,host=30,disk=40"],
)
@pytest.mark.parametrize("weights", SPLITS)
def test_every_placement(tiny_llama_dir, tiny_reference, weights, kv_cache, micro_batches, overlap):
    """Wherever weights and KV live: the tokens of transformers, from several micro-batches."""
    more = settings(weights, kv_cache, micro_batches, overlap=overlap)
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **more)
    assert done.tokens == tiny_reference
    assert max(done.micro_batches) >= micro_batches


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(tiny_llama_dir, tmp_path_factory, weights, bits):
    """Expanded on the GPU: the tokens of the same weights on the CPU."""
    offload = tmp_path_factory.getbasetemp() / "quantized"
    chosen = {"weight_bits": bits, "head_bits": 8, "offload_dir": offload}
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings(weights, "device=100", **chosen))
    on_cpu = settings("device=100", "device=100", **chosen) | {"device": "cpu"}
    assert done.tokens == run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **on_cpu).tokens


@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_products(tiny_llama_dir, tmp_path_factory, monkeypatch, weights, bits):
    """Few rows multiply what stays packed, in slots that are used again: the tokens of the CPU."""

    def few(self: Expansion, weight: Weight, rows: list[int]) -> bool:
        return max(rows) <= 8 and self.can_stay_packed(weight)

    offload = tmp_path_factory.getbasetemp() / "quantized"
    chosen = {"weight_bits": bits, "head_bits": 8, "offload_dir": offload}
    on_cpu = settings("device=100", "device=100", **chosen) | {"device": "cpu"}
    expected = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **on_cpu).tokens
    monkeypatch.setattr(Expansion, "stays_packed", few)
    with LLM(tiny_llama_dir, **settings(weights, "device=100", **chosen)) as llm:
        done = generate(llm, PROMPTS, NEW_TOKENS)
        assert done.tokens == expected
        runtime = engine_of(llm)._runtime
        store, each = runtime.weights.store, runtime.shape.expanded_in_sweep
        assert 0 < store.expanded_bytes < len(done.plans) * each
        assert store._expansion is not None
        assert store._expansion._times, "both ways are measured at the start"


@pytest.mark.parametrize("attention", ["device", "host"])
@pytest.mark.parametrize("kv_cache", ["device=100", "host=100", "device=30,host=40,disk=30"])
def test_a_quantized_kv_cache(tiny_llama_dir, kv_cache, attention):
    """Packed and read on the GPU, from every tier: the tokens of the same cache on the CPU."""
    chosen: dict[str, Any] = {"kv_bits": 4, "attention": attention, "micro_batch_rows": 400}
    chosen |= {"max_rows": 2000, "policy": Policy(page_tokens=8)}
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings("device=100", kv_cache, **chosen))
    on_cpu = settings("device=100", "device=100", **chosen) | {"device": "cpu"}
    assert done.tokens == run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **on_cpu).tokens
    longest = max(span.end for plan in done.plans for span in plan.spans)
    assert longest > 3 * 8, "packed pages are read"


@pytest.mark.parametrize("activations", ["host=100", "device=50,host=50"])
@pytest.mark.parametrize("kv_cache", ["device=100", "host=50,disk=50"])
def test_activations_that_wait_on_host(tiny_llama_dir, tiny_reference, activations, kv_cache):
    """Hidden states come and go while others compute: the tokens of transformers."""
    more = settings("device=25,host=75", kv_cache, 4, activations=activations)
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **more)
    assert done.tokens == tiny_reference
    assert done.summary["bytes_by_kind"]["host->device"]["activations"] > 0


@pytest.mark.parametrize("kv_cache", ["device=100", "host=100", "disk=100"])
@pytest.mark.parametrize("weights", SPLITS)
def test_a_real_model(smollm2_dir, pytestconfig, weights, kv_cache):
    """A model of 135M parameters gives the tokens of transformers from every tier."""
    prompts = smol_prompts(smollm2_dir, 16)
    reference = cached_reference(pytestconfig, smollm2_dir, prompts, 16)
    more = settings(weights, kv_cache, max_rows=512, micro_batch_rows=170, max_sequences=64)
    done = run(smollm2_dir, prompts, 16, **more)
    assert done.tokens == reference
    assert max(done.micro_batches) >= 3


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in test_architectures.INEXACT])
def test_families(tmp_path, monkeypatch, family):
    """A random model of every family generates the tokens of transformers."""

    def load_engine(directory: Path) -> LLM:
        more = settings("device=30,host=40,disk=30", "device=50,host=50", max_sequences=4)
        return LLM(directory, **more)

    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(test_architectures, "load_engine", load_engine)
    model = random_twin(config_of(family), seed=0)
    test_architectures.assert_engine_is_exact(model, tmp_path / "model")


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("weights", SPLITS)
@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_tied_llama_dir"])
def test_weights_cross_their_link_once_a_sweep(request, model, weights, micro_batches):
    """Each weight that is not at home on the GPU crosses once per sweep, to the byte."""
    directory = request.getfixturevalue(model)
    done = run(directory, PROMPTS, 4, **settings(weights, "device=100", micro_batches))
    assert max(done.micro_batches) >= micro_batches
    sweeps = len(done.plans)
    expected = streamed_bytes(placeable(directory, 4), weights, "cuda")
    assert counted(done, "weights") == {link: n * sweeps for link, n in expected.items()}


def test_kv_crosses_as_the_formula_says(tiny_llama_dir):
    """New rows go to HOST to the byte; pages with content come back whole."""
    done = run(tiny_llama_dir, PROMPTS, NEW_TOKENS, **settings("device=100", "host=100"))
    token_bytes = 4 * 2 * 2 * 16 * 4
    spans = [span for plan in done.plans for batch in plan.micro_batches for span in batch.spans]
    pages = sum(-(-span.start // PAGE) for span in spans)
    rows = sum(span.length for span in spans)
    assert counted(done, "kv") == {
        "device->host": rows * token_bytes,
        "host->device": pages * PAGE * token_bytes,
    }


def warm_up() -> None:
    """cuBLAS takes its own workspace with the first product: it belongs to no engine."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, device="cuda", dtype=dtype)
        (square @ square).sum().item()


@pytest.mark.parametrize("kv_cache", ["device=100", "host=100", "disk=100"])
@pytest.mark.parametrize("weights", ["device=25,host=75", "host=50,disk=50", "disk=100"])
def test_the_budget_of_the_device_holds(smollm2_dir, weights, kv_cache):
    """What torch allocates at its peak, activations included, is within --device-memory."""
    warm_up()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = 200 * MIB  # the weights are 257 MiB
    prompts = smol_prompts(smollm2_dir, 32)
    more = {"dtype": "bfloat16", "device_memory": budget, "max_rows": 512, "max_sequences": 32}
    cut = {"micro_batch_rows": 128}
    with LLM(smollm2_dir, **settings(weights, kv_cache, 4) | more | cut) as llm:
        shape = engine_of(llm)._runtime.shape
        done = generate(llm, prompts, 16)
        peak = torch.cuda.max_memory_allocated() - before
    assert shape.weight_bytes > budget
    assert done.summary["peak_bytes"]["device"] <= budget
    assert shape.head_bytes < peak <= budget


@pytest.mark.parametrize("weights", SPLITS)
def test_memory_is_given_back(tiny_llama_dir, weights):
    """After close nothing is allocated on the GPU, pinned on the host, or charged."""
    warm_up()
    before = torch.cuda.memory_allocated()
    llm = LLM(tiny_llama_dir, **settings(weights, "device=50,host=50"))
    backend: Any = engine_of(llm)._runtime.backend
    assert backend._pinned._registered, "KV pages on HOST are pinned"
    generate(llm, PROMPTS, 4)
    llm.close()
    assert torch.cuda.memory_allocated() == before
    assert not backend._pinned._registered
    assert backend.account.used == dict.fromkeys(Tier, 0)


def test_a_model_that_does_not_fit_is_refused(smollm2_dir):
    """A budget below the model's bytes is refused with what is missing, and leaves nothing."""
    before = torch.cuda.memory_allocated()
    more = settings("device=100", "device=100", device_memory=100 * MIB)
    with pytest.raises(CapacityError, match="missing") as caught:
        LLM(smollm2_dir, **more)
    assert "--device-memory" in str(caught.value)
    assert torch.cuda.memory_allocated() == before
