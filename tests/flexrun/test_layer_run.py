"""Some of a model's layers run, and what all of them are said to take."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from flexrun import model_profile
from flexrun.disk_weights import plan_disk
from flexrun.layer_run import LayerRun, Size
from flexrun.loading import model_shape
from flexrun.model import build_model
from flexrun.model_profile import Profiler, measured_profile, rising
from flexrun.model_weights import find_weights
from flexrun.plan import MicroBatch, RowSpan, SweepPlan
from flexrun.timed_sweep import Timed, timed
from flexrun.twin_config import few_layers
from offload.backend import DeviceBackend
from offload.backend_cpu import CpuBackend
from offload.backend_emulated import EmulatedBackend, EmulatedMachine
from offload.errors import CapacityError, OffloadStoreError
from offload.packed import can_pack
from offload.tiers import MemoryAccount, Tier
from offload.timeline import Interval
from policy_search import model_profile as known_profiles
from policy_search.model_profile import profile_key

if TYPE_CHECKING:
    from collections.abc import Sequence

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
SINGLE_ROWS = [1, 2, 4, 8, 16, 32, 64]


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
    assert few_layers(LLAMA, 1, whole_head=True)[1] == [6.0]
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
    rows = [n for n, _ in profile.layers]
    assert rows[:7] == SINGLE_ROWS
    assert rows == sorted(rows)
    seconds = [s for _, s in profile.layers]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert [n for n, _ in profile.head] == SINGLE_ROWS
    assert 0 <= profile.compute_lost < 1
    assert 0 <= profile.link_lost < 1
    assert {tier: backend.account.available(tier) for tier in Tier} == before
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_a_layer_nothing_is_measured(tmp_path):
    """The machine's own speeds have to do; nothing stays charged."""
    account = MemoryAccount(dict.fromkeys(Tier, 200_000))
    backend = CpuBackend(account)
    with pytest.raises(CapacityError, match="a measurement of the machine needs"):
        measured_profile(LLAMA, shape_of(LLAMA), torch.float32, backend, tmp_path)
    assert account.used == dict.fromkeys(Tier, 0)
    backend.close()


def test_models_of_few_positions_are_not_measured_beyond_them(tmp_path):
    """A table of positions ends where the model's context does; a very short one is refused."""
    backend = CpuBackend(MemoryAccount(dict.fromkeys(Tier, 64 << 20)))
    for positions, context in ((256, 128), (1024, 512)):
        sizes = SIZES | {"max_position_embeddings": positions, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes)
        with contextlib.ExitStack() as closing:
            run = LayerRun(config, shape_of(config), torch.float32, backend, (2, 512), closing)
            assert run.context == context
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 150, "num_hidden_layers": 2})
    with pytest.raises(CapacityError, match="too short"), contextlib.ExitStack() as closing:
        LayerRun(config, shape_of(config), torch.float32, backend, (2, 512), closing)
    backend.close()


def test_without_a_disk_the_rest_is_measured(tmp_path, monkeypatch, caplog):
    """What links and layers lose to each other needs a file on a CPU."""
    backend = CpuBackend(MemoryAccount(dict.fromkeys(Tier, 64 << 20)))

    def fail(*_):
        raise OffloadStoreError("no space left", hint="none")

    monkeypatch.setattr("flexrun.link_calibration.LinkCalibration._make_file", fail)
    found = measured_profile(LLAMA, shape_of(LLAMA), torch.float32, backend, tmp_path, 0.2)
    assert (found.compute_lost, found.link_lost) == (0.0, 0.0)
    assert found.layers
    assert "is not known: no space left" in caplog.text
    assert backend.account.used == dict.fromkeys(Tier, 0)
    backend.close()


def test_rows_visit_different_experts(backend):
    """As the tokens of a job do: rows that are alike would read as few matrices as one."""
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = LayerRun(MIXED, shape_of(MIXED), torch.float32, backend, (2, 32), closing)
        visited: list[int] = []
        layers: list[Any] = run.model.layers
        layer = next(each for each in layers if hasattr(each.mlp, "gate"))

        def note(module, args, output):
            logits = output[0] if isinstance(output, tuple) else output
            visited.extend(logits.float().topk(2).indices.flatten().tolist())

        handle = layer.mlp.gate.register_forward_hook(note)
        run.generating(32, 1, 1)
        handle.remove()
        assert len(set(visited[-64:])) == 4


def test_what_is_attended_to_was_written(backend, monkeypatch):
    """Nothing is computed before sequences generate, and no page is the system's one of zeros."""
    shape = shape_of(LLAMA)
    with contextlib.ExitStack() as closing, torch.inference_mode():
        run = LayerRun(LLAMA, shape, torch.float32, backend, (4, 512), closing)
        sweeps: list[Timed] = []
        inner = run.sweep

        def sweep():
            sweeps.append(inner())
            return sweeps[-1]

        monkeypatch.setattr(run, "sweep", sweep)
        timed = run.generating(4, 400, 2)
        assert [each.rows for each in sweeps] == [4, 4, 4]
        assert [each.read for each in sweeps] == [4 * 400, 4 * 401, 4 * 402]
        assert timed.read == 4 * 402
        for layer in range(len(run.model.attention)):
            raw = run.cache.pool(Tier.DEVICE, layer).raw
            assert raw.std() == pytest.approx(1, rel=0.2)
            assert raw.abs().amax(dim=1).min() > 1


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
        assert prompts.whole > prompts.seconds + prompts.head


def test_a_layer_counts_as_often_as_the_model_has_it():
    """What the clock says of each unit, of its weights and of the wait before them, for each layer
    that it stands for; the head, which is there once, apart.
    """
    counts, at = [1.0, 2.5, 2.5, 1.0], 100.0
    intervals = [Interval("compute", "start of micro-batch 0", at, at + 0.5, 0)]
    for unit in range(5):
        begin = at + 10 * (unit + 1)
        intervals.append(Interval("compute", "weights", begin - 1, begin - 0.75, 0))
        name = f"unit {unit}, micro-batch 0"
        intervals.append(Interval("compute", name, begin, begin + 2**unit / 4, 0))
    intervals.append(Interval("sampling", "sampling", at + 60, at + 61, 0))
    spans = (RowSpan(0, 4, 1, True), RowSpan(1, 6, 3, True))
    found = timed(SweepPlan((MicroBatch(spans),)), intervals, counts, wall=70.0)
    layers = 0.25 + 2.5 * 0.5 + 2.5 * 1.0 + 2.0
    assert found.seconds == pytest.approx(0.5 + layers + 0.25 * (sum(counts) + 1))
    assert found.head == 4.0
    waits = [8.5 * 1, 8.75 * 2.5, 8.5 * 2.5, 8 * 1, 7 * 1]  # before each unit's weights
    assert found.program == pytest.approx(sum(waits) + 0.75 * (sum(counts) + 1))
    assert found.around == pytest.approx(70 - (50 + 4.0))
    assert (found.rows, found.read, found.positions) == (4, 5, 7 + 8 + 9)


class Clock:
    """A run whose sweeps take what a formula says, times a factor for each that is asked for."""

    context, sequences_at_once, prompt_rows, whole_head = 512, 8, [128, 256, 1024], True
    packs = head_packed = True

    def __init__(self, read: float, attend: float, factors: Sequence[float] = ()) -> None:
        self.read, self.attend, self.packed = read, attend, 1.0
        self.rows_cost = 1 / 8
        self.factors = iter(factors)
        self.asked: list[tuple[int, int]] = []

    def pack(self):
        self.packed = 0.5
        return True

    def took(self, rows, read, positions):
        seconds = self.packed * (2.0 + rows * self.rows_cost)
        seconds += read * self.read + positions * self.attend
        head = self.packed * (0.5 + rows / 64)
        factor = next(self.factors, 1.0)
        times = (factor * each for each in (seconds, head, 0.25, 0.125, 0.001))
        return Timed(rows, read, positions, *times)

    def timed(self, size, repeats):
        measure = self.generating if size.generating else self.prompts
        return measure(size.sequences, size.length, repeats)

    def generating(self, count, context, repeats):
        self.asked.append((count, context))
        return self.took(count, count * (context + repeats), 0)

    def prompts(self, count, length, repeats):
        self.asked.append((count, length))
        return self.took(count * length, 0, count * length * (length + 1) // 2)


def profiler(read: float, attend: float, seconds: float, factors: Sequence[float] = ()) -> Profiler:
    run: Any = Clock(read, attend, factors)
    return Profiler(run, shape_of(LLAMA), seconds)


def test_operators_are_told_apart():
    """From a clock that is known, what it is made of."""
    shape = shape_of(LLAMA)
    kv, flops = sum(shape.kv_rows), shape.attention_flops
    found = profiler(2e-3, 1e-3, 1e9).profile()
    assert found.device_attention == pytest.approx(kv / 2e-3)
    assert found.attention_flops == pytest.approx(flops / 1e-3)
    assert [rows for rows, _ in found.layers] == [*SINGLE_ROWS, 128, 256, 1024]
    for rows, seconds in found.layers:
        own = 2e-3 * rows * 2 if rows <= 64 else 0.0  # the few positions of single rows
        assert seconds == pytest.approx(2 + rows / 8 + own)
    assert dict(found.in_place)[1024] == pytest.approx(0.5 * (2 + 1024 / 8))
    assert found.head == tuple((n, 0.5 + n / 64) for n in SINGLE_ROWS)
    assert found.head_in_place == tuple((n, 0.5 * (0.5 + n / 64)) for n in SINGLE_ROWS)
    assert (found.program, found.around) == (0.25, 0.125)


def test_longer_prompts_need_not_divide_the_rows():
    """Of a model with fewer positions: held against the nearest number of rows, in proportion."""
    run: Any = Clock(2e-3, 1e-3)
    run.context, run.prompt_rows = 384, [128, 512]
    found = Profiler(run, shape_of(LLAMA), 1e9).profile()
    assert (1, 384) in run.asked
    assert found.attention_flops == pytest.approx(shape_of(LLAMA).attention_flops / 1e-3)


def test_what_rows_take_anyway_is_not_attention():
    """Of a longer prompt with other rows than the short ones, whose time hardly depends on them."""
    run: Any = Clock(2e-3, 1e-4)
    run.context, run.prompt_rows = 384, [128, 512]
    run.rows_cost = 1 / 800  # 0.48 s for 384 rows, and 2 s in any case
    found = Profiler(run, shape_of(LLAMA), 1e9).profile()
    assert found.attention_flops == pytest.approx(shape_of(LLAMA).attention_flops / 1e-4)


@pytest.mark.parametrize(
    ("alone", "speed", "computed", "slower", "expected"),
    [
        (8.0, 6.0, 1.0, 1.25, (0.2, 0.25)),
        (8.0, 9.0, 1.0, 0.9, (0.0, 0.0)),
        (8.0, 0.1, 1.0, 100.0, (0.9, 0.9)),
        (0.0, 0.0, 1.0, 2.0, (0.0, 0.0)),
    ],
)
def test_what_layers_and_links_lose_to_each_other(
    monkeypatch, tmp_path, alone, speed, computed, slower, expected
):
    """Parts of what each does alone, within limits; nothing without copies."""
    speeds, sweeps = iter([alone, speed]), iter([computed, slower])

    class Copies(contextlib.AbstractContextManager):  # type: ignore[type-arg]
        def __init__(self, *_):
            pass

        def __exit__(self, *_):
            pass

        def prepare(self, seconds):
            pass

        def beside(self, link, call):
            return next(speeds), call()

    monkeypatch.setattr(model_profile, "LinkCalibration", Copies)
    monkeypatch.setattr(model_profile, "_wait", lambda seconds: seconds)
    monkeypatch.setattr(model_profile, "_sweep_seconds", lambda *_: next(sweeps))
    run: Any = None
    with contextlib.closing(CpuBackend(MemoryAccount())) as backend:
        found = model_profile._lost(run, backend, torch.float32, tmp_path, 0.1)
    assert found == pytest.approx(expected)


def test_a_slow_spell_is_forgotten():
    """Of rounds of all sizes, some of which take three times as long; each size by itself would
    have been measured within the spell or outside of it.
    """
    steady = profiler(2e-3, 1e-3, 1e9).profile()
    singles, prompts = 8, 4
    calls = prompts * (singles + 1)  # of a round; there are nine
    before = 1 + singles + 2 * calls
    spell = [1.0] * before + [3.0] * (3 * calls)
    assert profiler(2e-3, 1e-3, 1e9, spell).profile() == steady
    beyond = [1.0] * before + [3.0] * (5 * calls)
    assert profiler(2e-3, 1e-3, 1e9, beyond).profile() != steady


def test_sizes_that_are_held_out_are_measured_in_the_same_rounds():
    """Beside those of as many rows, with both kinds of weights; they change nothing in it."""
    run: Any = Clock(2e-3, 1e-3)
    held_out = [Size(3, 1, generating=True), Size(5, 48)]
    profiling = Profiler(run, shape_of(LLAMA), 1e9, held_out)
    assert profiling.profile() == profiler(2e-3, 1e-3, 1e9).profile()
    plain, packed = (each.held_out for each in profiling.measured)
    assert list(plain) == list(packed) == held_out
    assert plain[held_out[0]].head == 2 * packed[held_out[0]].head == 0.5 + 3 / 64
    assert plain[held_out[1]].rows == 5 * 48
    singles = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (8, 512), (16, 1), (32, 1), (64, 1)]
    first = [(5, 48), (1, 128), (2, 128), (8, 128), (2, 512)]
    rising = [(1, 128), (5, 48), (2, 128), (8, 128), (2, 512)]
    turns = (each for prompts in (first, rising, rising) for each in prompts)
    rounds = [*singles, *(size for each in turns for size in (*singles, each))]
    assert run.asked[1 : 1 + len(rounds)] == rounds


def test_a_head_that_is_a_table_too_has_one_way():
    """It is never in the processor's order, however the layers are."""
    profiling = profiler(2e-3, 1e-3, 1e9)
    run: Any = profiling._run
    run.head_packed = False
    found = profiling.profile()
    assert found.in_place
    assert found.head
    assert found.head_in_place == ()


@pytest.mark.skipif(not can_pack(), reason="this CPU multiplies bfloat16 in no order of its own")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_the_processors_order_are_measured_apart(tmp_path, tied):
    """Of layers, and of a head that is no table; modules are plain afterwards."""
    config = LlamaConfig(num_hidden_layers=6, tie_word_embeddings=tied, **SIZES)
    shape = shape_of(config, torch.bfloat16)
    backend = CpuBackend(MemoryAccount(dict.fromkeys(Tier, 64 << 20)))
    found = measured_profile(config, shape, torch.bfloat16, backend, tmp_path, 0.5)
    assert [rows for rows, _ in found.in_place][:7] == SINGLE_ROWS
    assert [rows for rows, _ in found.head_in_place] == ([] if tied else SINGLE_ROWS)
    backend.close()


@pytest.mark.parametrize("seed", range(20))
def test_seconds_that_rise_are_the_nearest(seed):
    """Against all ways to give neighbours their mean."""
    draw = random.Random(seed)
    points = [(2**n, 1 + 0.2 * n + draw.gauss(0, 0.3 * (seed % 4))) for n in range(7)]
    points = [(rows, abs(seconds)) for rows, seconds in points]
    best: tuple[float, list[float]] = (math.inf, [])
    for cuts in itertools.product([False, True], repeat=6):
        groups = [[points[0][1]]]
        for cut, (_, seconds) in zip(cuts, points[1:]):
            groups.append([seconds]) if cut else groups[-1].append(seconds)
        means = [statistics.fmean(group) for group in groups for _ in group]
        squares = sum((mean - seconds) ** 2 for mean, (_, seconds) in zip(means, points))
        if means == sorted(means):
            best = min(best, (squares, means))
    found = rising(points)
    assert [rows for rows, _ in found] == [rows for rows, _ in points]
    assert [seconds for _, seconds in found] == pytest.approx(best[1])


def test_what_is_no_time_or_no_more_rows_is_left_out():
    """A prompt of a model with few positions may have no more rows than there were single ones."""
    assert rising([(1, 2.0), (64, 4.0), (64, 3.0), (128, -1.0), (256, 5.0)]) == (
        (1, 2.0),
        (64, 4.0),
        (256, 5.0),
    )


def test_noise_is_no_speed():
    """Where attention takes next to nothing, the machine's speeds stand."""
    found = profiler(1e-9, 1e-9, 1e9).profile()
    assert found.device_attention == found.attention_flops == math.inf


def test_with_little_time_one_size_of_prompts_is_measured():
    """Never none: what many rows take would be guessed from few."""
    one = profiler(0.0, 0.0, 0.0)
    assert [rows for rows, _ in one.profile().layers][-2:] == [64, 128]
    clock: Any = one._run
    assert clock.asked.count((1, 128)) == 2  # plain and packed, in one round each


def test_bits_do_not_change_a_models_profile():
    """The same layers are computed, however they are stored; another width is another model."""
    wider = LlamaConfig(num_hidden_layers=6, **SIZES | {"intermediate_size": 192})
    assert profile_key(shape_of(LLAMA)) != profile_key(shape_of(wider))
    assert profile_key(shape_of(LLAMA)) != profile_key(shape_of(LLAMA, torch.bfloat16))


def test_what_profiles_are_made_to_measure_is_in_their_key(monkeypatch):
    """The code of an architecture, of a head that is a table too, and of the libraries."""
    shape = shape_of(LLAMA)
    assert shape.architecture == "llama"
    tied = LlamaConfig(num_hidden_layers=6, tie_word_embeddings=True, **SIZES)
    others = [replace(shape, architecture="qwen2"), shape_of(tied)]
    keys = [profile_key(each) for each in (shape, *others)]
    monkeypatch.setattr(known_profiles, "_version", lambda _: "of tomorrow")
    keys.append(profile_key(shape))
    assert len(set(keys)) == len(keys)
