"""Jobs under a plan that was searched for: within budgets, the same tokens, bytes as predicted."""

from __future__ import annotations

import contextlib
import random

import pytest

from flexrun import LLM
from flexrun.errors import CapacityError, RequestError, UsageError
from flexrun.planning_speeds import PlanningSpeeds
from offload.tiers import Tier
from policy_search.workload import JobLengths
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.test_quantized import PROMPTS
from tests.flexrun.test_planning_speeds import profile
from tests.speeds import SPEEDS

pytestmark = pytest.mark.usefixtures("one_thread")


LONGEST = max(map(len, PROMPTS)) + 4


def settings(seed: int) -> dict[str, object]:
    """A random machine."""
    draw = random.Random(seed)
    device = draw.choice(["emulated", "cpu"])
    memory = {"device_memory": draw.randint(300, 1200) << 10, "disk_space": 8 << 20}
    if device == "emulated":
        memory["host_memory"] = draw.randint(300, 3000) << 10
    batch = {"micro_batch_rows": 16, "max_rows": 32} if draw.random() < 0.7 else {}
    return {
        "device": device,
        **memory,
        **batch,
        "job_lengths": JobLengths(9, 20.0, 4.0, 4, most_tokens=LONGEST),
    }


@pytest.fixture(scope="module")
def expected(tiny_llama_dir):
    """Without any plan."""
    with LLM(tiny_llama_dir, device="cpu", weights="device=100", kv_cache="device=100") as llm:
        return generate(llm, PROMPTS, 4).tokens


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_gives_the_same_tokens_within_its_memory(
    tiny_llama_dir, tmp_path, expected, seed, caplog
):
    """On any machine that can hold it; no tier is ever fuller than it may be."""
    given = settings(seed)
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(LLM(tiny_llama_dir, offload_dir=tmp_path, **given))
        except CapacityError as error:
            pytest.skip(f"this machine is too small: {error.message}")
        if engine_of(llm)._runtime.scheduler.pools.fits_ever(LONGEST):
            assert "will fail" not in caplog.text
            assert generate(llm, PROMPTS, 4).tokens == expected
        else:
            assert f"no room for one sequence of {LONGEST} tokens" in caplog.text
            with pytest.raises(RequestError, match="do not fit into the KV cache"):
                generate(llm, PROMPTS, 4)
        account = engine_of(llm)._runtime.backend.account
        for tier in Tier:
            assert account.peak[tier] <= (account.limits[tier] or 0)


MACHINE = {"device": "emulated", "emulate": "capacity=1MiB", "host_memory": 64 << 20}


def test_the_plan_that_is_quickest_in_rehearsals_is_taken(tiny_llama_dir, tmp_path, monkeypatch):
    """Whatever the closed form says of it."""
    taken = []

    def slowest(search, candidates):
        taken.append(min(candidates, key=lambda each: each.prediction.tokens_per_second))
        return taken[-1]

    monkeypatch.setattr("flexrun.model_plan.quickest", slowest)
    job = JobLengths(9, 20.0, 4.0, 4, most_tokens=LONGEST)
    with LLM(tiny_llama_dir, offload_dir=tmp_path, job_lengths=job, **MACHINE) as llm:
        assert engine_of(llm)._runtime.policy == taken[0].policy


def test_a_rehearsal_that_fails_costs_no_job(
    tiny_llama_dir, tmp_path, expected, monkeypatch, caplog
):
    """The closed form's best plan is taken, and a warning says why."""

    def fail(*_):
        raise AssertionError("the scheduler has stopped")

    monkeypatch.setattr("flexrun.model_plan.quickest", fail)
    job = JobLengths(9, 20.0, 4.0, 4, most_tokens=LONGEST)
    with LLM(tiny_llama_dir, offload_dir=tmp_path, job_lengths=job, **MACHINE) as llm:
        assert generate(llm, PROMPTS, 4).tokens == expected
    assert "cannot be rehearsed" in caplog.text


@pytest.mark.parametrize("numbers", [(0, 20, 4), (2.0, 20, 4), (2, 0, 4), (2, 20, 0)])
def test_a_job_of_nothing_is_refused(tiny_llama_dir, numbers):
    job = JobLengths(*numbers)
    with pytest.raises(UsageError, match="job_lengths must be of one sequence or more"):
        LLM(tiny_llama_dir, device="cpu", job_lengths=job)


@pytest.mark.parametrize("most_tokens", [-1, 50.0, None])
def test_tokens_of_a_sequence_are_counted(tiny_llama_dir, most_tokens):
    job = JobLengths(2, 20, 4, most_tokens=most_tokens)
    with pytest.raises(UsageError, match="most_tokens of job_lengths must be a whole number"):
        LLM(tiny_llama_dir, device="cpu", job_lengths=job)


def test_a_job_measures_its_model_once(tiny_llama_dir, tmp_path, expected, monkeypatch, caplog):
    """Before it plans, under its budgets; the next job finds it, and tokens stay the same."""
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(PlanningSpeeds, "_profile", profile)
    monkeypatch.setattr("flexrun.model_profile.SECONDS", 0.2)
    machine = {"emulate": "capacity=64MiB", "host_memory": 64 << 20, "disk_space": 64 << 20}
    given = {"device": "emulated", **machine, "weights": "device=20,host=80"}
    for job, times in enumerate((1, 0)):
        caplog.clear()
        with LLM(tiny_llama_dir, offload_dir=tmp_path / str(job), **given) as llm:
            assert generate(llm, PROMPTS, 4).tokens == expected
            runtime = engine_of(llm)._runtime
            assert runtime.foresight is not None
            assert runtime.foresight.cost.hardware.profile is not None
            account = runtime.backend.account
            assert all(account.peak[tier] <= (account.limits[tier] or 0) for tier in Tier)
        assert caplog.text.count("measuring this model's layers") == times
        assert "cannot be measured" not in caplog.text
    assert len(list((tmp_path / "cache" / "profiles").glob("*.json"))) == 1


def test_bytes_are_those_that_were_predicted(tiny_llama_dir, tmp_path):
    """What the cost model says that the link carries is what crossed it: weights to the byte, new
    keys and values, too.
    """
    given = {"weights": "device=20,host=80", "kv_cache": "host=100", "attention": "device"}
    batch = {"micro_batch_rows": 16, "max_rows": 32, "max_sequences": 4, "speculation": "off"}
    with LLM(tiny_llama_dir, device="emulated", offload_dir=tmp_path, **given, **batch) as llm:
        found = generate(llm, PROMPTS, 6)
        engine = engine_of(llm)
        foresight, runtime = engine._runtime.foresight, engine._runtime
        assert foresight is not None
        sweeps = len(found.plans)
        streamed = foresight.cost.streamed
        assert streamed == runtime.weights.store.streamed_bytes
        counted = {str(k): v for k, v in found.summary["bytes_by_kind"].items()}
        assert counted["host->device"]["weights"] == streamed * sweeps
        down = foresight.busy["device->host"] * SPEEDS.device_to_host
        assert down == pytest.approx(counted["device->host"]["kv"], rel=1e-9)
        pages = foresight.busy["host->device"] * SPEEDS.host_to_device - streamed * sweeps
        page = runtime.shape.kv_token_bytes * runtime.policy.page_tokens
        moved = counted["host->device"]["kv"]
        sequences = sum(len(plan.spans) for plan in found.plans)
        assert moved - page * sequences <= pages <= moved + page * sequences


def test_the_summary_holds_prediction_against_the_run(tiny_llama_dir, tmp_path):
    """And the plan is described beforehand."""
    with LLM(
        tiny_llama_dir, device="emulated", offload_dir=tmp_path, weights="host=100", max_sequences=4
    ) as llm:
        assert "plan:    " in engine_of(llm).describe()
        generate(llm, PROMPTS, 2)
        found = llm.summary()["predicted"]
        assert found["seconds"].keys() == {"predicted", "measured"}
        assert {"compute", "host->device"} <= found["terms"].keys()


def test_a_machine_that_cannot_be_measured_runs_the_job(
    tiny_llama_dir, tmp_path, expected, monkeypatch, caplog
):
    """Under the plan that needs no speeds."""
    monkeypatch.setattr(PlanningSpeeds, "_load", lambda _: None)

    def fail(_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(PlanningSpeeds, "_measure", fail)
    memory = {"device_memory": 800 << 10, "host_memory": 4 << 20, "disk_space": 4 << 20}
    batch = {"micro_batch_rows": 16, "max_rows": 32}
    with LLM(tiny_llama_dir, device="emulated", offload_dir=tmp_path, **memory, **batch) as llm:
        assert generate(llm, PROMPTS, 4).tokens == expected
        assert "predicted" not in llm.summary()
    assert "the plan knows no speeds: CUDA error" in caplog.text
