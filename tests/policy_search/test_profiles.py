"""Facts about published measurements as costs: what their publishers would get."""

from __future__ import annotations

from pathlib import Path

import pytest

from policy_search.arrivals import TimedRequest
from policy_search.latency import Latencies
from policy_search.model_config import ModelConfig
from policy_search.profiles import PROFILES, AffineCost, MeasuredCost, equivalent_prompt
from policy_search.shape_from_config import shape_from_config
from policy_search.simulator import run
from policy_search.sweep_load import SweepLoad
from tests.policy_search.simulated import scenario

OPT = PROFILES["opt-13b-a100"].cost
H100 = PROFILES["llama2-70b-h100"].cost
LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def prompts(*lengths: int) -> SweepLoad:
    """A sweep of whole prompts."""
    positions = sum(length * (length + 1) // 2 for length in lengths)
    return SweepLoad(sum(lengths), 0, 0, positions, sum(lengths))


def generating(sequences: int, context: int) -> SweepLoad:
    """A sweep of sequences with so many stored tokens each; all attend to their new one, too."""
    read = sequences * (context + 1)
    return SweepLoad(sequences, sequences, read, read, 0)


@pytest.mark.parametrize(
    ("lengths", "milliseconds"), [([512], 72.149), ([128] * 8, 123.394), ([2000], 250.416)]
)
def test_distserve_computes_prompts_in_its_time(lengths, milliseconds):
    """As its simulator's formula gives, by hand."""
    assert isinstance(OPT, AffineCost)
    assert OPT.prefill_ms(prompts(*lengths)) == pytest.approx(milliseconds, abs=5e-4)


@pytest.mark.parametrize(
    ("sequences", "context", "milliseconds"), [(32, 1000, 41.249), (128, 600, 72.033)]
)
def test_distserve_generates_in_its_time(sequences, context, milliseconds):
    """Below and above the batch size at which its fits change."""
    assert isinstance(OPT, AffineCost)
    load = generating(sequences, context)
    assert OPT.decode_ms(load) == pytest.approx(milliseconds, abs=5e-4)


def test_a_sweep_has_the_time_of_both_and_its_worker():
    both = SweepLoad(*(a + b for a, b in zip(prompts(512), generating(32, 1000))))
    terms = OPT(both)
    assert terms.busy["compute"] == pytest.approx((72.149 + 41.249) / 1000, abs=1e-6)
    tokens = 512 + 32 * 1001
    assert terms.seconds - terms.busy["compute"] == pytest.approx((2 + 1 + tokens * 1e-4) / 1000)


@pytest.mark.parametrize("lengths", [[1], [100, 700], [2048, 1, 1, 350], [128] * 8])
def test_the_equivalent_prompt_has_the_attention_of_all(lengths):
    """Vidur's rule: keys times queries are as many, causal or not."""
    equal = equivalent_prompt(prompts(*lengths))
    assert equal**2 == pytest.approx(sum(length**2 for length in lengths))
    assert max(lengths) <= equal <= sum(lengths)


def test_chunks_have_the_attention_of_their_prompt():
    """Squares of what is equivalent add up, because positions do."""
    first = SweepLoad(300, 0, 0, 300 * 301 // 2, 300)
    rest = SweepLoad(200, 0, 0, 500 * 501 // 2 - 300 * 301 // 2, 500)
    parts = equivalent_prompt(first) ** 2 + equivalent_prompt(rest) ** 2
    assert parts == pytest.approx(equivalent_prompt(prompts(500)) ** 2)


def test_splitwise_is_exact_where_it_was_measured_and_straight_between():
    assert isinstance(H100, MeasuredCost)
    at = {tokens: H100.prompt_ms(tokens) for tokens in (512, 2048, 3072, 8192)}
    assert at == pytest.approx({512: 53.9, 2048: 136.8, 3072: (136.8 + 390) / 2, 8192: 845.0})
    assert H100.prompt_ms(10240) == pytest.approx(845 + (845 - 390) / 2)
    mixed = H100(SweepLoad(1024, 24, 0, 0, 0)).seconds
    assert mixed == pytest.approx(1.1 * 0.0779), "prompts with others that generate"


def test_a_single_request_takes_what_splitwise_measured():
    """2 048 tokens and 100 generated, alone: 136.8 ms, then 99 times 31.05 ms."""
    requests = [TimedRequest(7.0, 2048, 100)]
    latencies = Latencies.of(requests, run(scenario(H100).cluster(), requests))
    assert latencies.ttft[0] == pytest.approx(0.1368, rel=0.01)
    assert latencies.e2e[0] == pytest.approx(0.1368 + 99 * 0.03105, rel=0.01)


def test_keys_and_values_are_those_of_the_model():
    """Of fewer heads than there are queries; of OPT-13B keys and values of 40 x 5120 values."""
    shape = shape_from_config(ModelConfig(Path("Llama-2-70B"), LLAMA_2_70B), "float16")
    assert PROFILES["llama2-70b-h100"].kv_token_bytes == shape.kv_token_bytes == 320 * 1024
    assert PROFILES["opt-13b-a100"].kv_token_bytes == 2 * 40 * 5120 * 2
