"""Bits that the plan may choose: those that the machine makes worth it, and the same to the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexrun import LLM
from flexrun.errors import CapacityError, UsageError
from flexrun.planning_speeds import PlanningSpeeds
from offload.prepared_layout import FOLDER
from policy_search.policy import Policy
from policy_search.workload import JobLengths
from tests.end_to_end.harness import engine_of, generate
from tests.end_to_end.test_quantized import PROMPTS, Commands
from tests.foreign_checkpoints import write_foreign
from tests.speeds import SPEEDS

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW_LINK = ["--device", "emulated", "--emulate", "host-to-device=5MB/s", "--weights", "host=100"]
ROOMY = ["--device", "cpu", "--weights", "device=100"]
BATCH = ["--kv-cache", "device=100", "--max-sequences", "9", "--max-rows", "48"]
ALLOWED = "--allow-quantization"


@pytest.fixture
def commands(tiny_llama_dir, tmp_path, capsys) -> Commands:
    return Commands(tiny_llama_dir, tmp_path, capsys)


@pytest.fixture
def fast(monkeypatch):
    """A machine whose compute is no bound, with the slow link of its emulated device."""
    speeds = replace(
        SPEEDS, host_to_device=5e6, flops=1e12, matrix_read=1e12, device_attention=1e12
    )
    monkeypatch.setattr(PlanningSpeeds, "_load", lambda _: speeds)


def rates(stdout: str) -> dict[str, float | None]:
    found = json.loads(stdout.splitlines()[-1])["bits"]
    return found["predicted_tokens_per_second"]


def test_a_job_keeps_the_bits_that_its_first_run_chose(commands, fast, tmp_path):
    """Four on a slow link, and still four on a machine that would take all; tokens are theirs."""
    assert commands.generate("--weight-bits", "4", *ROOMY, *BATCH) == 0
    expected, sidecar = commands.tokens(), Path(f"{commands.output}.job.json")
    recorded = sidecar.read_text()
    commands.output.unlink()
    assert commands.generate(ALLOWED, *SLOW_LINK, *BATCH) == 0
    assert (
        "bits:    weights in 4 bits, KV cache as computed: --allow-quantization" in commands.stderr
    )
    assert "layers in 4 bits" in commands.stderr
    predicted = {name: rate or 0.0 for name, rate in rates(commands.stdout).items()}
    assert predicted["4/16"] > 1.2 * predicted["8/16"] > 1.44 * predicted["16/16"]
    assert commands.tokens() == expected
    assert sidecar.read_text() == recorded  # as if the bits had been given
    lines = commands.output.read_bytes().splitlines(keepends=True)
    commands.output.write_bytes(b"".join(lines[:3]) + lines[3][:9])  # killed within a write
    assert commands.generate(ALLOWED, *ROOMY, *BATCH) == 0
    assert "as the job began: weights in 4 bits, KV cache as computed" in commands.stderr
    assert '"bits"' not in commands.stdout  # nothing was to be chosen
    assert commands.tokens() == expected
    commands.output.unlink()
    assert commands.generate(ALLOWED, *ROOMY, *BATCH) == 0  # a new job
    assert "bits:    weights as stored, KV cache as computed" in commands.stderr
    assert commands.tokens() != expected


def test_what_is_given_stays(commands, fast, tmp_path):
    """Weights of 16 bits on the machine that would take 4: nothing is prepared."""
    assert commands.generate(ALLOWED, "--weight-bits", "16", *SLOW_LINK, *BATCH) == 0
    assert rates(commands.stdout).keys() == {"16/16", "16/4"}
    assert "bits:    weights as stored, KV cache as computed" in commands.stderr
    assert not (tmp_path / "offload" / FOLDER).exists()
    everything = ["--weight-bits", "16", "--kv-bits", "16"]
    assert commands.generate(ALLOWED, *everything, *SLOW_LINK, *BATCH) == 0  # the same job


def test_a_policy_has_its_own_bits(commands, tmp_path, tiny_llama_dir):
    """The flag beside a policy's file is refused before anything is loaded or written."""
    path = tmp_path / "policy.json"
    path.write_text(Policy(weight_bits=4).to_json())
    assert commands.generate(ALLOWED, "--policy", str(path)) == 2
    assert "--allow-quantization lets the plan choose bits, but with --policy" in commands.stderr
    assert "hint: leave out --allow-quantization" in commands.stderr
    assert not commands.output.exists()
    with pytest.raises(UsageError, match="allow_quantization lets the plan choose"):
        LLM(tiny_llama_dir, policy=Policy(), allow_quantization=True)
    with pytest.raises(UsageError, match="allow_quantization must be true or false, not 'yes'"):
        LLM(tiny_llama_dir, allow_quantization="yes")


def test_a_benchmark_chooses_for_its_own_job(commands, fast):
    """Lengths are those that it draws."""
    job = ["--workload", "fixed", "--requests", "3", "--prompt-len", "9", "--gen-len", "5"]
    assert commands("bench", *job, ALLOWED, *SLOW_LINK, *BATCH, "--dtype", "float32") == 0
    found = json.loads(commands.stdout.splitlines()[-1])["bits"]
    assert found["chosen"] == "4/16"
    assert found["job"] == {"sequences": 3, "prompt": 9, "output": 5}


def test_a_model_that_fits_in_few_bits_only_gets_them(tiny_llama_dir, tmp_path, fast):
    """All weights have to be in memory that takes a part of them; with less, nothing fits."""
    chosen = {"device": "cpu", "weights": "device=100", "offload_dir": tmp_path}
    batch = {"micro_batch_rows": 16, "max_rows": 16, "max_sequences": 2, "device_memory": "700KiB"}
    with pytest.raises(CapacityError):
        LLM(tiny_llama_dir, **chosen, **batch)
    with LLM(tiny_llama_dir, **chosen, **batch, allow_quantization=True) as llm:
        found = llm.summary()["bits"]
        assert found["predicted_tokens_per_second"]["16/16"] is None
        assert engine_of(llm).bits["weight_bits"] == 4  # in 8 there is no room for a sequence
        generate(llm, PROMPTS[:2], 2)
    batch["device_memory"] = "100KiB"
    with pytest.raises(CapacityError, match="weights in 4 bits, KV cache in 4 bits"):
        LLM(tiny_llama_dir, **chosen, **batch, allow_quantization=True)


def test_a_checkpoint_that_comes_quantized_keeps_its_bits(tiny_llama_dir, tmp_path, fast):
    """Only the KV cache is free; unless told, the job is taken to be conversations."""
    write_foreign(tiny_llama_dir, tmp_path / "gptq", "gptq")
    chosen = {"device": "cpu", "offload_dir": tmp_path / "offload", "max_rows": 48}
    job = JobLengths(99, 50.0, 9.0)
    with LLM(
        tmp_path / "gptq", **chosen, max_sequences=4, allow_quantization=True, job_lengths=job
    ) as llm:
        found = llm.summary()["bits"]
        assert found["predicted_tokens_per_second"].keys() == {"16/16", "16/4"}
        assert engine_of(llm).bits == {"weight_bits": 16, "kv_bits": 16}
        assert found["job"]["sequences"] == 99
