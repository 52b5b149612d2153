"""Some of a model's layers run, and what all of them are said to take."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from flexrun.disk_weights import plan_disk
from flexrun.layer_run import LayerRun
from flexrun.loading import model_shape
from flexrun.model import build_model
from flexrun.model_profile import measured_profile
from flexrun.model_weights import find_weights
from flexrun.twin_config import few_layers
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.errors import CapacityError
from offload.tiers import MemoryAccount, Tier
from policy_search.model_profile import profile_key

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "bos_token_id": 500,
    "eos_token_id": 501,
}
LLAMA = LlamaConfig(num_hidden_layers=6, **SIZES)
MIXED = Qwen3MoeConfig(
    num_hidden_layers=7,
    decoder_sparse_step=1,
    mlp_only_layers=[0, 3],
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    head_dim=16,
    **SIZES,
)


class _Nowhere:
    """Where weights would be if there were any."""

    def load(self, names):
        raise AssertionError("nothing is loaded")

    def fingerprint(self):
        return b"nowhere"

    def in_place(self, names):
        return None

    def check_unchanged(self):
        return None


def shape_of(config, dtype=torch.float32):
    model = build_model(config, dtype, torch.device("cpu"))
    weights = find_weights(model)
    disk = plan_disk(_Nowhere(), weights.units, Path("/nowhere"))
    return model_shape(model, weights, dtype, disk)


@pytest.fixture(params=["cpu", "emulated"])
def backend(request):
    account = MemoryAccount(dict.fromkeys(Tier, 64 << 20))
    made: DeviceBackend
    if request.param == "cpu":
        made = CpuBackend(account)
    else:
        made = EmulatedBackend(account, EmulatedMachine())
    yield made
    made.close()


def test_layers_stand_for_all_of_their_kind():
    """As many as were asked for, of each kind; together they stand for the whole model."""
    small, counts = few_layers(LLAMA, 4, whole_head=True)
    assert (small.num_hidden_layers, counts) == (4, [1.5] * 4)
    assert small.vocab_size == LLAMA.vocab_size
    small, counts = few_layers(MIXED, 2, whole_head=False)
    assert counts == [1.0, 2.5, 2.5, 1.0]  # dense, with experts, with experts, dense
    assert (small.mlp_only_layers, small.hidden_size) == ([0, 3], 64)
    assert small.eos_token_id < small.vocab_size < LLAMA.vocab_size


@pytest.mark.parametrize("config", [LLAMA, MIXED], ids=["llama", "mixed"])
def test_a_model_is_measured_and_nothing_stays(backend, tmp_path, config):
    """Rising rows that take no less time, and all budgets as they were."""
    before = {tier: backend.account.available(tier) for tier in Tier}
    shape = shape_of(config)
    profile = measured_profile(config, shape, torch.float32, backend, tmp_path, 0.5)
    assert profile is not None
    rows = [n for n, _ in profile.layers]
    assert rows[:5] == [1, 4, 16, 32, 64]
    assert rows == sorted(rows)
    seconds = [s for _, s in profile.layers]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert [n for n, _ in profile.head] == [1, 4, 16, 32, 64]
    assert 0 <= profile.compute_lost < 1
    assert 0 <= profile.link_lost < 1
    assert min(profile.program, profile.device_attention, profile.attention_flops) > 0
    assert {tier: backend.account.available(tier) for tier in Tier} == before
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_a_layer_nothing_is_measured(tmp_path):
    """The machine's own speeds have to do; nothing stays charged."""
    account = MemoryAccount(dict.fromkeys(Tier, 200_000))
    backend = CpuBackend(account)
    assert measured_profile(LLAMA, shape_of(LLAMA), torch.float32, backend, tmp_path) is None
    assert account.available(Tier.DEVICE) == 200_000
    with pytest.raises(CapacityError), contextlib.ExitStack() as closing:
        LayerRun(LLAMA, shape_of(LLAMA), torch.float32, backend, (2, 32), closing)
    assert account.available(Tier.DEVICE) == 200_000
    backend.close()


def test_sweeps_are_what_was_asked_for(backend):
    """Rows and positions of those that generate, and of prompts."""
    shape = shape_of(LLAMA)
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = LayerRun(LLAMA, shape, torch.float32, backend, (4, 64), closing)
        generating = run.generating(3, 40, 1)
        assert (generating.rows, generating.read, generating.positions) == (3, 3 * 41, 0)
        prompts = run.prompts(2, 64, 1)
        assert (prompts.rows, prompts.read) == (128, 0)
        assert prompts.positions == 2 * sum(range(1, 65))
        assert not run.scheduler.running
        assert prompts.seconds > 0
        assert prompts.whole == prompts.seconds + prompts.head + prompts.program


def test_a_layer_counts_as_often_as_the_model_has_it(monkeypatch):
    """What the clock says of each unit, times the layers that it stands for; the head apart."""
    account = MemoryAccount(dict.fromkeys(Tier, 64 << 20))
    backend = CpuBackend(account)
    with contextlib.ExitStack() as closing:
        run = LayerRun(MIXED, shape_of(MIXED), torch.float32, backend, (2, 32), closing)
        counts = run._counts
        assert sum(counts) == 7
        clock = run._timeline
        for unit in range(len(counts) + 1):
            clock.add("compute", f"unit {unit}, micro-batch 0", 10.0 * unit, 10.0 * unit + 2**unit)
        clock.add("compute", "start of micro-batch 0", 1000.0, 1000.5)
        clock.add("sampling", "sampling", 2000.0, 2000.25)
        total = sum(2**unit for unit in range(len(counts) + 1)) + 0.5
        layers, head, program = run._taken(total + 1.0)
        assert layers == pytest.approx(0.5 + sum(2**n * each for n, each in enumerate(counts)))
        assert head == 2 ** len(counts)
        assert program == pytest.approx((7 + 2) / (len(counts) + 2))
    backend.close()


def test_bits_do_not_change_a_models_profile():
    """The same layers are computed, however they are stored; another width is another model."""
    wider = LlamaConfig(num_hidden_layers=6, **SIZES | {"intermediate_size": 192})
    assert profile_key(shape_of(LLAMA)) != profile_key(shape_of(wider))
    assert profile_key(shape_of(LLAMA)) != profile_key(shape_of(LLAMA, torch.bfloat16))
