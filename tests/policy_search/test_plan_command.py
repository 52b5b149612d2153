"""Facts about plans as people and programs get them from `policy-search`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from flexrun.arguments import build_parser, engine_config
from offload.tiers import Tier
from policy_search import planned_machine
from policy_search.__main__ import main
from policy_search.plan_text import duration
from policy_search.plot import frontier, roofs
from policy_search.policy import Policy
from tests.policy_search.test_search import planner_of

ASKED = ["--model", "llama-3-70b", "--hardware", "4090", "--host-memory", "128GiB"]
ASKED += ["--prompt-len", "512", "--gen-len", "128"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """The machine that runs the tests may have a GPU."""
    monkeypatch.setattr(planned_machine, "gpu_budget", lambda: None)


def test_a_plan_on_one_screen(capsys):
    """Tiers, batch, job, speed, bound, what would help, other plans, and the command."""
    assert main([*ASKED, "--compare"]) == 0
    text = capsys.readouterr().out
    for start in ("device: [", "host:   [", "disk:   [", "sweep:  ", "job:    ", "speed:  ",
                  "bound:  ", "faster: ", "compared:", "  FlexGen's way "):  # fmt: skip
        assert f"\n{start}" in text
    assert len(text.splitlines()) < 40
    words = shlex.split(next(line for line in text.splitlines() if "flexrun generate" in line))
    config = engine_config(vars(build_parser("0").parse_args(words[1:])))
    assert config.host_memory == 128 << 30
    assert config.model == "path/to/llama-3-70b"  # where it is, nobody knows
    assert config.weights is not None
    assert config.weights.device > 0


def test_a_plan_for_programs(capsys, tmp_path):
    """One object: what was asked for, found and predicted; the policy's file holds the same."""
    path = tmp_path / "policy.json"
    assert main([*ASKED, "--json", "--compare", "-o", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Policy.load(path) == Policy.from_json(json.dumps(found["policy"]))
    predicted = found["predicted"]
    parts = predicted["prefill_seconds"] + predicted["decode_seconds"]
    assert predicted["job_seconds"] == pytest.approx(parts)
    generated = 2048 * 128 / predicted["job_seconds"]
    assert predicted["tokens_per_second"] == pytest.approx(generated)
    assert found["bound"] == max(predicted["terms"], key=lambda name: predicted["terms"][name])
    for tier in Tier:
        assert 0 <= found["memory"][tier]["used"] <= found["memory"][tier]["capacity"]
    assert found["compared"]["nothing offloaded"] is None


def test_a_named_plan_needs_neither_torch_nor_a_network():
    """The whole way, from a model's and a machine's name."""
    code = (
        "import socket, sys; socket.socket.connect = None; "
        "from policy_search.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers')) and 'torch')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *ASKED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_json_is_all_of_stdout():
    """Also with HiGHS, which prints a banner."""
    pytest.importorskip("highspy")
    command = [sys.executable, "-m", "policy_search", *ASKED, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["policy"]["weights"]
    assert "HiGHS" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama-3-405b", "--hardware", "laptop"], "missing"),
        ([*ASKED, "--hardware", "5090"], "no machine is known as '5090'"),
        ([*ASKED, "--hardware", "FILE"], "FILE"),
        ([*ASKED, "--disk-read", "0"], "--disk-read must be at least 1"),
        ([*ASKED, "--max-latency", "1"], "no plan finishes a request within 1 s"),
        ([*ASKED, "--deadline", "-3"], "--deadline must be above 0"),
        ([*ASKED, "--plot", "DIR/plan.poem"], "cannot write"),
        ([*ASKED, "--minimize", "memory", "--allow-quantization"], "for given bits"),
    ],
)
def test_what_cannot_be_planned_is_said(capsys, tmp_path, arguments, words):
    """With exit code 2 and a hint."""
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    broken = tmp_path / "FILE.json"
    broken.write_text('{"speeds": {"host_to_device": 0}}')
    names = {"FILE": str(broken), "DIR/plan.poem": str(tmp_path / "plan.poem")}
    assert main([names.get(word, word) for word in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert "hint: " in output.err


def test_prompts_of_a_file_are_the_job(capsys, tmp_path, tiny_llama_dir):
    """Their own lengths, each completion counted."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3, 4], "max_tokens": 6, "n": 2}\n' * 3)
    words = ["--model", str(tiny_llama_dir), "--unified", "--device-memory", "1GiB", "--json"]
    assert main([*words, "--input", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["job"] == {"sequences": 6, "prompt": 4.0, "output": 6.0}


def test_an_image_is_drawn(tmp_path):
    """If matplotlib is there."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert main([*ASKED, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_an_image_shows():
    """Of candidates those that no other one beats; of resources what each would allow alone."""
    plan = planner_of().plan(Policy())
    best = [each.prediction for each in frontier(plan.candidates)]
    assert len(best) > 2
    for one, other in zip(best, best[1:]):  # noqa: RUF007
        assert one.request_seconds < other.request_seconds
        assert one.tokens_per_second < other.tokens_per_second
    running = plan.prediction.running
    for points in roofs(plan).values():
        assert points[0][0] == pytest.approx(1)
        assert points[-1][0] == pytest.approx(4 * running)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (4.2, "4.2 s"), (300, "5 min"), (36000, "10 h")],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
