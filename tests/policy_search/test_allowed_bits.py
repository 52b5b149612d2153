"""Facts about `policy-search --allow-quantization`: the bits that a machine makes worth having."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexrun.arguments import build_parser, engine_config
from policy_search import planned_machine
from policy_search.__main__ import main
from policy_search.named_models import NAMED_MODELS
from policy_search.policy import Policy
from tests.foreign_checkpoints import write_foreign

ROWS = ["--micro-batch", "512", "--max-rows", "2048"]  # so that fewer plans are tried
SMALL_GPU = ["--device-memory", "16GiB", "--host-memory", "64GiB", "--disk-space", "500GB", *ROWS]
LARGE_GPU = ["--device-memory", "80GiB", *SMALL_GPU[2:]]
ALLOWED = "--allow-quantization"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """The machine that runs the tests may have a GPU."""
    monkeypatch.setattr(planned_machine, "gpu_budget", lambda: None)


@pytest.fixture
def model(tmp_path) -> Path:
    """Llama-2-13B's config, which is enough for a plan."""
    (tmp_path / "config.json").write_text(json.dumps(NAMED_MODELS["llama-2-13b"].settings))
    return tmp_path


@pytest.fixture
def plan(model, capsys):
    def plan(*arguments: str, model: Path = model) -> dict[str, Any]:
        assert main(["--model", str(model), *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return plan


def bits(found: dict[str, Any]) -> tuple[int, int]:
    return found["policy"]["weight_bits"], found["policy"]["kv_bits"]


def test_a_machine_bound_by_its_link_takes_few_bits(plan):
    """26 GB of weights beside 16 GiB: 4 bits fit, so that nothing crosses the link."""
    found = plan(*SMALL_GPU, ALLOWED)
    assert bits(found)[0] == 4
    rates = found["bits"]["predicted_tokens_per_second"]
    assert found["bits"]["chosen"] == "{}/{}".format(*bits(found))
    assert rates["4/16"] > 1.5 * rates["16/16"]


def test_a_machine_bound_by_compute_takes_all_bits(plan):
    """Where everything fits, expanding weights only takes time."""
    found = plan(*LARGE_GPU, ALLOWED, "--kv-bits", "16")
    assert bits(found) == (16, 16)
    rates = found["bits"]["predicted_tokens_per_second"]
    assert rates["16/16"] > rates["8/16"]


def test_without_the_flag_nothing_is_chosen(plan):
    """The plan is the one of the bits that are given, and says nothing of others."""
    found = plan(*SMALL_GPU)
    assert bits(found) == (16, 16)
    assert "bits" not in found


def test_what_is_given_stays(plan):
    """Weights of 16 bits on the machine that would take 4, and likewise the KV cache."""
    found = plan(*SMALL_GPU, ALLOWED, "--weight-bits", "16")
    assert bits(found)[0] == 16
    assert found["bits"]["predicted_tokens_per_second"].keys() == {"16/16", "16/4"}
    found = plan(*SMALL_GPU, ALLOWED, "--kv-bits", "16")
    assert bits(found) == (4, 16)
    assert len(found["bits"]["predicted_tokens_per_second"]) == 3
    found = plan(*LARGE_GPU, ALLOWED, "--weight-bits", "8", "--kv-bits", "4")
    assert bits(found) == (8, 4)


def test_the_choice_depends_on_speeds_and_job(plan):
    """A link as fast as memory leaves 16 bits; long sequences need the KV cache in 4."""
    fast = ["--link", "1TB/s", "--expansion", "100GB/s"]
    assert bits(plan(*SMALL_GPU, ALLOWED, "--kv-bits", "16", *fast)) == (16, 16)
    job = ["--workload", "fixed", "--gen-len", "64", "--requests", "8"]
    few = plan(*LARGE_GPU, ALLOWED, *job, "--prompt-len", "64", "--tflops", "1")
    assert bits(few) == (16, 16)
    assert few["bits"]["job"] == {"sequences": 8, "prompt": 64, "output": 64}
    long = ["--requests", "999", "--prompt-len", "10", "--gen-len", "3900", "--tflops", "10000"]
    streamed = ["--weight-bits", "16", "--link", "5GB/s"]
    assert bits(plan(*SMALL_GPU, ALLOWED, *job[:2], *long, *streamed)) == (16, 4)


def test_a_checkpoint_that_comes_quantized_keeps_its_bits(tiny_llama_dir, plan, tmp_path):
    """Only the KV cache is free."""
    write_foreign(tiny_llama_dir, tmp_path / "gptq", "gptq")
    found = plan("--unified", "--device-memory", "1GiB", ALLOWED, model=tmp_path / "gptq")
    assert found["bits"]["predicted_tokens_per_second"].keys() == {"16/16", "16/4"}
    assert found["policy"]["weight_bits"] == 16


def test_a_model_that_fits_in_few_bits_only_gets_them(plan, model, capsys):
    """No disk, and RAM for a third of the weights; with less, the error names both ends."""
    budgets = ["--device-memory", "6GiB", "--disk-space", "9GiB", "--unified"]
    batch = ["--max-rows", "256", "--micro-batch", "64", "--max-sequences", "4", "--kv-bits", "16"]
    assert main(["--model", str(model), *budgets, *batch]) == 2
    assert "missing on disk" in capsys.readouterr().err
    found = plan(*budgets, *batch, ALLOWED)
    assert bits(found) == (4, 16)
    rates = found["bits"]["predicted_tokens_per_second"]
    assert rates["16/16"] is rates["8/16"] is None
    budgets[3] = "2GiB"
    assert main(["--model", str(model), *budgets, *batch, ALLOWED]) == 2
    error = capsys.readouterr().err
    assert "nor does it fit with the fewest bits (weights in 4 bits, KV cache as computed)" in error
    assert error.count("missing on disk") == 2


def test_the_plan_says_why_and_can_be_used(plan, model, capsys, tmp_path):
    """In its text, in the command that it prints, and in the file that `--policy` reads."""
    path = tmp_path / "policy.json"
    assert main(["--model", str(model), *SMALL_GPU, ALLOWED, "-o", str(path)]) == 0
    text = capsys.readouterr().out
    assert "bits:    weights in 4 bits, KV cache in 4 bits: --allow-quantization" in text
    assert "predicted tokens/s by bits of weights/KV cache: 16/16 " in text
    words = shlex.split(next(line for line in text.splitlines() if "flexrun generate" in line))
    config = engine_config(vars(build_parser("0").parse_args(words[1:])))
    policy = Policy.load(path)
    assert (config.weight_bits, config.kv_bits) == (policy.weight_bits, policy.kv_bits) == (4, 4)
    assert (config.weights, config.kv_cache) == (policy.weights, policy.kv_cache)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requests", "0"], "a job without requests needs no plan"),
        (["--link", "0"], "--link must be at least 1, not 0"),
        (["--disk-read", "0"], "--disk-read must be at least 1, not 0"),
        (["--tflops", "nan"], "--tflops must be at least 1e-06, not nan"),
        (["--expansion", "much"], "cannot read the size 'much'"),
    ],
)
def test_what_is_wrong_is_said(model, capsys, arguments, words):
    """Exit code 2 and a reason."""
    assert main(["--model", str(model), *SMALL_GPU, ALLOWED, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_bits_are_chosen_without_torch(model):
    """As fast as any other plan."""
    code = (
        "import sys; from policy_search.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers')) and 'torch')"
    )
    flags = ["--model", str(model), *SMALL_GPU, ALLOWED]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
