"""Facts about `policy-search simulate`: what its flags do together."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from policy_search.__main__ import main
from policy_search.capacity import HIGHEST
from policy_search.presets import machine
from policy_search.simulate_flags import add_simulate_flags

SMALL = ("--requests", "20", "--scale", "0.05", "--profile", "llama2-70b-h100")


def run(capsys, *arguments: str) -> dict[str, Any]:
    assert main(["simulate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def trace(tmp_path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n10,2048,100\n20,512,1\n")
    return path


def test_a_trace_is_run(capsys, trace):
    """From its first arrival to its last token, which is the second request's only one."""
    result = run(capsys, "--trace", str(trace), "--profile", "llama2-70b-h100")
    assert result["makespan_seconds"] == pytest.approx(10 + 0.0539)
    assert result["latency"]["ttft"]["mean"] == pytest.approx((0.1368 + 0.0539) / 2)
    assert result["latency"]["tpot"]["p99"] == pytest.approx(0.03105)
    assert (result["prompt_tokens"], result["generated_tokens"]) == (2560, 101)


def test_goodput_counts_who_was_served(capsys, trace):
    given = ["--trace", str(trace), "--profile", "llama2-70b-h100", "--ttft", "0.1"]
    result = run(capsys, *given)
    assert result["attainment"] == 0.5
    assert result["goodput"] == pytest.approx(1 / result["makespan_seconds"])
    assert run(capsys, *given[:4])["goodput"] is None, "there are no targets"


def test_prompts_are_counted(capsys, tmp_path, tiny_llama_dir):
    """Token ids by themselves, and with a model as a job would read the file."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3], "max_tokens": 2, "n": 3}\n')
    assert run(capsys, "--input", str(path))["generated_tokens"] == 6
    found = run(capsys, "--input", str(path), "--model", str(tiny_llama_dir), "--gen-len", "7")
    assert (found["requests"], found["prompt_tokens"], found["generated_tokens"]) == (3, 9, 6)


def test_a_plan_is_simulated(capsys, tmp_path):
    """As long as its closed form says, with all of its terms and its room for pages."""
    path = tmp_path / "policy.json"
    job = ["--prompt-len", "512", "--gen-len", "128", "--requests", "600"]
    known = ["--model", "llama-3-70b", "--hardware", "4090", "--host-memory", "128GiB"]
    assert main([*known, *job, "-o", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    found = run(capsys, *known, *job, "--policy", str(path))
    predicted = planned["predicted"]
    assert found["makespan_seconds"] == pytest.approx(predicted["job_seconds"], rel=0.15)
    kv = sum(tier["kv"] for tier in planned["memory"].values())
    assert 0 <= kv - found["kv_bytes"] < 32 * 320 * 1024
    busy = found["machines"][0]["busy"]
    assert busy["disk->host"] > 0.8
    assert {"host->device", "compute", "host attention"} <= busy.keys()


def test_a_split_reports_its_network(capsys):
    given = [*SMALL, "--workload", "fixed", "--gen-len", "60"]
    one, split = run(capsys, *given), run(capsys, *given, "--split", "2:1", "--network", "1GB/s")
    assert one["network"] is None
    assert split["network"]["nbytes"] == split["prompt_tokens"] * 320 * 1024
    assert split["network"]["busy"] == pytest.approx(
        split["network"]["nbytes"] / 1e9 / split["makespan_seconds"]
    )
    assert [machine["name"] for machine in split["machines"]] == [
        "prompt machine 0",
        "prompt machine 1",
        "token machine 2",
    ]
    assert split["rows"] == one["rows"] == sum(each["rows"] for each in split["machines"])


def test_prompts_are_computed_by_another_kind_of_machine(capsys, trace):
    """Splitwise's cluster of H100s that send to A100s: the first token in the time of the ones, and
    all others in that of the others.
    """
    given = ["--trace", str(trace), "--profile", "llama2-70b-a100", "--split", "1:1"]
    kinds = {
        "a100": run(capsys, *given),
        "h100": run(capsys, *given, "--prompt-profile", "llama2-70b-h100"),
    }
    ttft = {name: found["latency"]["ttft"]["mean"] for name, found in kinds.items()}
    assert ttft == pytest.approx({"a100": (0.274 + 0.093) / 2, "h100": (0.1368 + 0.0539) / 2})
    sent = 2048 * 320 * 1024 / 25e9
    for found in kinds.values():
        assert found["latency"]["tpot"]["mean"] == pytest.approx(0.045 + sent / 99)
    assert "prompt_machine" not in kinds["a100"]


def test_machines_of_two_kinds_have_a_plan_each(capsys, tmp_path):
    """Prompts with their own policy, on their own machine, and room for prompts only."""
    job = ["--model", "opt-30b", "--prompt-len", "512", "--requests", "40"]
    paths = {name: str(tmp_path / f"{name}.json") for name in ("prompts", "tokens", "packed")}
    for name, flags in {
        "prompts": ["--hardware", "a10g", "--gen-len", "1", "--max-rows", "4096"],
        "tokens": ["--hardware", "t4", "--gen-len", "32", "--max-rows", "2048"],
        "packed": ["--hardware", "t4", "--gen-len", "32", "--kv-bits", "4"],
    }.items():
        assert main([*job, *flags, "-o", paths[name]]) == 0
    given = [*job, "--gen-len", "32", "--hardware", "t4", "--policy", paths["tokens"]]
    other = ["--prompt-hardware", "a10g", "--prompt-policy", paths["prompts"]]
    capsys.readouterr()
    one = run(capsys, *given, "--split", "1:1")
    two = run(capsys, *given, "--split", "1:1", *other)
    assert {"max_rows", "kv_bytes", "sweep_weight_seconds"} == two["prompt_machine"].keys()
    assert two["prompt_machine"]["max_rows"] == 4096
    assert two["max_rows"] == one["max_rows"] == 2048
    assert two["latency"]["ttft"]["mean"] < one["latency"]["ttft"]["mean"]
    assert main(["simulate", *given, "--split", "1:1", *other]) == 0
    assert "prompts in those of up to" in capsys.readouterr().out
    packed = ["--prompt-policy", paths["packed"]]
    assert main(["simulate", *given, "--split", "1:1", *packed]) == 2
    assert "same KV bits" in capsys.readouterr().err


def test_a_named_machine_has_its_speeds_without_a_plan(capsys):
    """Its link brings the weights, unless another speed is given."""
    given = ["--model", "opt-6.7b", "--workload", "fixed", "--requests", "2", "--gen-len", "2"]
    link = {name: machine(name, {}).hardware.host_to_device for name in ("t4", "4090")}
    assert link["t4"] != link["4090"]
    seconds = [run(capsys, *given, "--hardware", name)["sweep_weight_seconds"] for name in link]
    assert seconds[0] / seconds[1] == pytest.approx(link["4090"] / link["t4"])
    stated = run(capsys, *given, "--hardware", "t4", "--link", "50GB")
    assert stated["sweep_weight_seconds"] == pytest.approx(seconds[0] * link["t4"] / 50e9)
    split = ["--split", "1:1", "--prompt-hardware", "4090"]
    both = run(capsys, *given, "--hardware", "t4", "--link", "50GB", *split)
    assert both["sweep_weight_seconds"] == stated["sweep_weight_seconds"]
    assert both["prompt_machine"]["sweep_weight_seconds"] == seconds[1], "the link is the other's"


def test_rates_are_for_each_gpu(capsys):
    """Of a machine with two for prompts, and one with one for tokens."""
    given = ["--requests", "40", "--scale", "0.5", "--profile", "opt-13b-a100", "--ttft", "0.25"]
    given += ["--tpot", "0.1", "--prompt-profile", "opt-13b-2xa100"]
    found = run(capsys, *given, "--find-split", "2")
    assert found["best"]["devices"] == 3
    whole = run(capsys, *given, "--split", "1:1", "--max-rate")
    assert found["rate_per_device"] == whole["max_rate_per_device"] == whole["max_rate"] / 3 > 0
    together = run(capsys, *given[:-2], "--machines", "3", "--max-rate")
    assert found["rate_together_per_device"] == together["max_rate_per_device"] > 0


def test_arrivals_are_drawn_by_the_seed(capsys):
    one, again, other = (run(capsys, *SMALL, "--rate", "5", "--seed", s) for s in "112")
    assert one == again != other


def test_the_highest_rate_is_one_that_is_kept(capsys):
    given = [*SMALL, "--ttft", "0.2", "--tpot", "0.1", "--machines", "2"]
    found = run(capsys, *given, "--max-rate")
    assert found["max_rate"] > 0
    assert found["max_rate_per_device"] == found["max_rate"] / 16
    kept = run(capsys, *given, "--rate", str(found["max_rate"]))
    assert kept["attainment"] == found["attainment"] >= 0.9
    none = run(capsys, *SMALL, "--ttft", "0.001", "--max-rate")
    assert (none["max_rate"], none["attainment"]) == (0.0, 0.0)


def test_requests_beyond_the_context_are_left_out(capsys, trace):
    given = ["--trace", str(trace), "--profile", "llama2-70b-h100"]
    found = [run(capsys, *given, "--context", n)["requests"] for n in ("2148", "2147", "512")]
    assert found == [2, 1, 0]


def test_a_split_is_found(capsys):
    """As a table and as JSON, with rates of its phases, of both, and of machines that do both."""
    given = [*SMALL, "--ttft", "0.2", "--tpot", "0.1", "--find-split", "2", "--network", "1GB"]
    found = run(capsys, *given)
    assert [(each["prompt_machines"], each["token_machines"]) for each in found["splits"]] == [
        (1, 1)
    ]
    assert found["best"] == found["splits"][0]
    split = [*SMALL, "--ttft", "0.2", "--tpot", "0.1", "--split", "1:1", "--network", "1GB"]
    whole = run(capsys, *split, "--max-rate")
    assert found["rate_per_device"] == whole["max_rate_per_device"] > 0
    assert main(["simulate", *given]) == 0
    text = capsys.readouterr().out
    assert "1:1 as a whole" in text
    assert found["best"]["token_rate"] >= HIGHEST, "all 20 find a place at once"
    assert " any " in text


def test_texts_and_files(capsys, tmp_path):
    """All that can be asked for at once."""
    files = ["--csv", str(tmp_path / "csv"), "--trace-out", str(tmp_path / "trace.json")]
    given = [*SMALL, "--split", "1:1", "--rate", "3", "--ttft", "1", "--tpot", "1", *files]
    assert main(["simulate", *given]) == 0
    text = capsys.readouterr().out
    for part in ("20 requests (conv)", "TTFT:", "TPOT:", "goodput:", "network:", "machine 1:"):
        assert part in text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "csv" / "detailed" / "0.csv").read_text().count("\n") == 21
    assert main(["simulate", *SMALL, "--max-rate", "--ttft", "1"]) == 0
    assert "highest rate:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trace", "x", "--input", "y"], "--trace and --input exclude each other"),
        (["--trace", "x", "--rate", "1"], "--trace and --rate exclude"),
        (["--trace", "x", "--scale", "2"], "--scale is for length tables"),
        (["--trace", "x", "--gen-len", "2"], "--gen-len is for length tables"),
        (["--input", "x", "--requests", "2"], "--requests is for length tables"),
        (["--trace", "nowhere.csv"], "cannot read the trace"),
        (["--input", "nowhere.jsonl"], "cannot read the input"),
        (["--kv-tokens", "1000000000"], "too large to simulate"),
        (["--rate", "0"], "not a number above 0"),
        (["--ttft", "nan"], "not a number above 0"),
        (["--machines", "0"], "whole number of at least 1"),
        (["--machines", "2", "--split", "1:1"], "--machines and --split exclude"),
        (["--split", "1"], "not two numbers"),
        (["--split", "1:0"], "whole number of at least 1"),
        (["--network", "1GB"], "give --split"),
        (["--prompt-hardware", "t4"], "give --split"),
        (["--split", "1:1", "--prompt-profile", "opt-13b-a100"], "give --profile, too"),
        (["--split", "1:1", "--prompt-policy", "x"], "give --policy, too"),
        (["--split", "1:1", "--prompt-hardware", "abacus"], "abacus"),
        (
            ["--split", "1:1", "--profile", "opt-13b-a100", "--prompt-hardware", "t4"],
            "--profile and --prompt-hardware exclude",
        ),
        (
            ["--split", "1:1", "--profile", "opt-13b-a100", "--prompt-profile", "llama2-70b-h100"],
            "--prompt-profile is of Llama-2-70B, and --profile of OPT-13B",
        ),
        (["--profile", "opt-13b-a100", "--hardware", "t4"], "--profile and --hardware exclude"),
        (["--hardware", "cpu"], "no link that weights come over"),
        (["--max-rate"], "give --ttft, --tpot or both"),
        (["--max-rate", "--ttft", "1", "--rate", "2"], "--max-rate and --rate exclude"),
        (["--find-split", "1", "--ttft", "1"], "one machine cannot be split"),
        (["--find-split", "2"], "give --ttft, --tpot or both"),
        (["--find-split", "2", "--ttft", "1", "--split", "1:1"], "--find-split and --split excl"),
        (["--find-split", "2", "--ttft", "1", "--rate", "2"], "--find-split and --rate exclude"),
        (["--profile", "opt-13b-a100", "--model", "x"], "--profile and --model exclude"),
        (["--profile", "opt-13b-a100", "--kv-bits", "4"], "--profile and --kv-bits exclude"),
        (["--profile", "abacus"], "invalid choice"),
        (["--csv", __file__], "is not a directory"),
        (["--csv", __file__ + "/deeper"], "cannot write"),
        (["--trace-out", "/"], "is a directory"),
        (["--trace-out", "/nowhere/trace.json"], "cannot write into"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, arguments, says):
    """Before anything is simulated, with the flag's name."""
    assert main(["simulate", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """`policy-search simulate ... | head -0`."""
    command = [sys.executable, "-m", "policy_search", "simulate", *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_no_flag_is_left_out_of_help():
    """Percent signs in help texts are doubled: argparse would fail on the others."""
    parser = argparse.ArgumentParser()
    add_simulate_flags(parser)
    assert "90% of the requests" in " ".join(parser.format_help().split())
