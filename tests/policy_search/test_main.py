"""Facts about the command policy-search."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from flexrun.arguments import build_parser, engine_config
from flexrun.engine import Engine
from offload.tiers import Tier
from policy_search import machine, planned_machine
from policy_search.__main__ import main
from policy_search.memory import longest_held, memory_of
from policy_search.policy import Policy
from tests import speeds

SMALL = ["--max-rows", "64", "--micro-batch", "16", "--max-sequences", "8"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """The machine that runs the tests may have a GPU."""
    monkeypatch.setattr(planned_machine, "gpu_budget", lambda: None)


def plan(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_that_fits_is_not_offloaded(tiny_llama_dir, capsys):
    """With room for everything, the text says so and every weight is on the device."""
    assert main(["--model", str(tiny_llama_dir), "--device-memory", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert "the model fits: do not offload" in text
    assert "host:   [......" in text


def test_the_printed_command_makes_the_same_plan(tiny_llama_dir, capsys):
    """The flags of the text, read by flexrun, give the policy that is in the JSON."""
    arguments = ["--model", str(tiny_llama_dir), "--device-memory", "900KiB", *SMALL]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "the model does not fit" in text
    words = shlex.split(next(line for line in text.splitlines() if "flexrun generate" in line))
    config = engine_config(vars(build_parser("0").parse_args(words[1:])))
    policy = Policy.from_json(json.dumps(plan(capsys, *arguments)))
    assert (config.weights, config.kv_cache) == (policy.weights, policy.kv_cache)
    assert (config.micro_batch_rows, config.max_rows, config.max_sequences) == (16, 64, 8)
    assert config.device_memory == 900 * 1024


def test_packed_keys_and_values_are_planned(tiny_llama_dir, capsys):
    """The flag is in the plan and in the command, and the newest pages in working memory."""
    arguments = ["--model", tiny_llama_dir, "--unified", "--device-memory", "1GiB", *SMALL]
    plain = plan(capsys, *arguments)
    packed = plan(capsys, *arguments, "--kv-bits", "4")
    assert (plain["policy"]["kv_bits"], packed["policy"]["kv_bits"]) == (16, 4)
    used, before = packed["memory"]["device"], plain["memory"]["device"]
    assert used["kv"] < before["kv"]
    newest = 2 * before["kv"] // (2048 // 32)  # of all pages, eight sequences have two each
    assert used["working"] >= before["working"] + newest
    assert main([*map(str, arguments), "--kv-bits", "4"]) == 0
    assert " --kv-bits 4" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["5MiB", "800KiB", "700KiB"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_the_engine_allocates_what_was_planned(tiny_llama_dir, capsys, memory, device, tmp_path):
    """Predicted bytes of weights and working memory are the engine's, on every tier."""
    file = tmp_path / "machine.json"
    file.write_text(speeds.machine(dict.fromkeys(Tier, 0), unified=device == "cpu").to_json())
    budgets = ["--device-memory", memory, "--host-memory", "4MiB", "--disk-space", "4MiB"]
    if device == "cpu":
        budgets[3] = memory  # one memory with two names
    arguments = ["--model", tiny_llama_dir, *budgets, *SMALL]
    planned = plan(capsys, *arguments, "--hardware", file)
    words = ["generate", "--input", "i", "--output", "o", "--device", device]
    parsed = build_parser("0").parse_args([*words, *map(str, arguments)])
    engine = Engine(engine_config(vars(parsed)), None)
    try:
        policy = Policy.from_json(json.dumps(planned))
        assert engine._runtime.policy == policy
        placed = engine._runtime.weights.placed
        assert {t: planned["memory"][t]["weights"] for t in Tier} == placed
        used = engine._runtime.backend.account.used
        for tier in (Tier.DEVICE, Tier.DISK):
            parts = planned["memory"][tier]
            lazy = parts["kv"] if tier in engine._runtime.backend.lazy else 0
            here = parts["weights"] - parts["elsewhere"]
            predicted = here + parts["working"] + parts["kv"] - lazy
            assert used[tier] == predicted
    finally:
        engine.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("weights", ["device=100", "device=50,disk=50"])
@pytest.mark.parametrize(
    ("kv_cache", "kv_bits"),
    [
        ("disk=100", "16"),
        ("device=20,host=30,disk=50", "16"),
        ("device=20,host=30,disk=50", "4"),
        ("host=50,disk=50", "16"),
    ],
)
def test_the_engine_allocates_what_is_predicted(tiny_llama_dir, weights, kv_cache, device, kv_bits):
    """With KV pages on disk, too: what staging and pages that are not full take is foreseen."""
    given = ["--weights", weights, "--kv-cache", kv_cache, "--disk-space", "4MiB"]
    given += ["--kv-bits", kv_bits]
    words = ["generate", "--input", "i", "--output", "o", "--device", device, *SMALL, *given]
    parsed = build_parser("0").parse_args([*words, "--model", str(tiny_llama_dir)])
    engine = Engine(engine_config(vars(parsed)), None)
    runtime = engine._runtime
    try:
        account, context = runtime.backend.account, runtime.model.context_length
        unified, limits = runtime.backend.unified, {t: int(account.limits[t] or 0) for t in Tier}
        memory = memory_of(runtime.shape, runtime.policy, limits, context, unified=unified)
        for tier in Tier:
            parts = memory[tier]
            lazy = parts.kv if tier in runtime.backend.lazy else 0
            # Rows of an embedding table that may not be on the device are always counted.
            rows = 64 * runtime.shape.hidden_size * 4 if tier is Tier.HOST else 0
            unused = parts.capacity - parts.free - lazy - account.used[tier]
            assert unused in (0, rows)
        assert memory[Tier.DISK].kv > 0
        # What one sequence may have, too; memory that is taken when it is written leaves a tenth.
        held = longest_held(runtime.shape, runtime.policy, memory)
        assert not runtime.pools.fits_ever(held + 1)
        assert runtime.pools.fits_ever(held if unified else int(0.9 * held) - 16)
    finally:
        engine.close()
    assert account.used == dict.fromkeys(Tier, 0)


def test_the_written_policy_can_be_read(tiny_llama_dir, capsys, tmp_path):
    """-o writes what --policy reads."""
    path = tmp_path / "policy.json"
    planned = plan(
        capsys, "--model", tiny_llama_dir, "--device-memory", "900KiB", *SMALL, "-o", path
    )
    assert Policy.load(path) == Policy.from_json(json.dumps(planned["policy"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "org/name"], "org/name is not a directory, and no model is known"),
        ([], "--model"),
        (["--model", "DIR", "--device-memory", "much"], "cannot read the size 'much'"),
        (["--model", "DIR", "--max-rows", "0"], "'0' is not a whole number of at least 1"),
        (["--model", "DIR", "--device-memory", "1KiB"], "is missing"),
        (["--model", "DIR", "--kv-bits", "8"], "--kv-bits: invalid choice: 8 (choose from 16, 4)"),
        (["--model", "DIR", "--unified", "--device-memory", "700KiB", "--disk-space", "0",
          "--dtype", "bfloat16", *SMALL], "missing on disk"),
        (["--model", "DIR", "--device-memory", "1GiB", "-o", "DIR"], "cannot write"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tiny_llama_dir, capsys, monkeypatch, arguments, words):
    """Wrong usage and models that do not fit exit with 2 and a hint on stderr."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    code = main([str(tiny_llama_dir) if word == "DIR" else word for word in arguments])
    assert code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert "hint: " in output.err or "looks like" in output.err


def test_without_a_gpu_the_plan_is_for_the_cpu(tiny_llama_dir, capsys):
    """RAM is then the device's memory, under either name, and nothing is on host."""
    planned = plan(capsys, "--model", tiny_llama_dir, "--host-memory", "1GiB")
    assert planned["memory"]["device"]["capacity"] == 2**30
    assert planned["memory"]["host"]["weights"] == 0


def test_a_gpu_is_asked_for_its_memory(tiny_llama_dir, capsys, monkeypatch):
    """Its free memory is the budget where none is given."""
    monkeypatch.setattr(planned_machine, "gpu_budget", lambda: 3 * 2**20)
    assert main(["--model", str(tiny_llama_dir), *SMALL]) == 0
    text = capsys.readouterr().out
    assert "--device cuda --device-memory 3MiB" in text


def test_it_runs_without_torch(tiny_llama_dir):
    """The whole way from config to plan imports neither torch nor transformers."""
    code = (
        "import sys; from policy_search.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers')) and 'torch')"
    )
    flags = ["--model", str(tiny_llama_dir), "--unified", "--device-memory", "1GiB"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
