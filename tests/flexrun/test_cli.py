"""Facts about the command: its checks, its loop, its exit codes and its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexrun import cli
from flexrun.arguments import JOB_DEFAULTS, build_parser, engine_config, flag_of, sampling_params
from flexrun.errors import CapacityError, OffloadStoreError, UsageError
from flexrun.tokenizer import Tokenizer
from offload.tiers import Split
from policy_search.policy import Policy
from policy_search.workload import JobLengths
from tests.flexrun.fake_engine import CONTEXT, FakeEngine
from tests.tiny_models import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
JOB = [{"prompt": "ab", "id": "first"}, {"prompt": "cd", "n": 2}, {"prompt_token_ids": [1, 2]}]


class Command:
    """Runs `flexrun generate` in this process on a model that is not there."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.input = directory / "model", directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        self.engines: list[FakeEngine] = []
        self.next_engine = FakeEngine()
        self.bits: dict[str, int] | None = None
        """What a plan would choose of those that are not given."""
        self.stdout = self.stderr = ""
        self._capsys = capsys

    def make_engine(self, config, tokenizer, on_bits):
        self.config = config
        if config.free_bits:
            plan = self.bits or {"weight_bits": 16, "kv_bits": 16}
            on_bits({name: getattr(config, name) or bits for name, bits in plan.items()})
        self.engines.append(self.next_engine)
        return self.next_engine

    def flags(self, *more: str) -> list[str]:
        names = {"--model": self.model, "--input": self.input, "--output": self.output}
        given = {flag: str(path) for flag, path in names.items() if flag not in more}
        return ["generate", *(word for pair in given.items() for word in pair), *more]

    def __call__(self, *more: str) -> int:
        self.next_engine = FakeEngine(self.next_engine.break_at_sweep, self.next_engine.error)
        code = cli.main(self.flags("--max-tokens", "3", *more))
        self.stdout, self.stderr = self._capsys.readouterr()
        return code

    def write(self, *requests: object) -> None:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in requests]
        self.input.write_text("".join(line + "\n" for line in lines))

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def last_line(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def command(tmp_path, capsys, monkeypatch) -> Command:
    command = Command(tmp_path, capsys)
    command.write(*JOB)
    monkeypatch.setattr(cli, "make_engine", command.make_engine)
    monkeypatch.setattr(Tokenizer, "load", lambda directory: Tokenizer(byte_tokenizer()))
    return command


def test_a_job_runs(command):
    """All requests get a line, the counts are the last line on stdout, the exit code is 0."""
    assert command() == 0
    results = {result["index"]: result for result in command.results()}
    assert [results[i]["id"] for i in range(3)] == ["first", "1", "2"]
    assert len(results[1]["completions"]) == 2
    assert command.last_line() == {
        "requests": 3,
        "failed": 0,
        "skipped": 0,
        "generated_tokens": 9,
    }
    assert "a fake engine" in command.stderr
    assert "a fake engine" not in command.stdout
    assert command.engines[0].closed


def test_bad_requests_fail_alone(command):
    """Bad lines and requests the engine refuses or loses have errors; the others run; exit 1."""
    long = {"prompt": "x" * CONTEXT}
    command.write({"prompt": "ab"}, "broken", "", long, {"prompt": "nan"}, {"prompt": "cd"})
    assert command() == 1
    codes = {r["index"]: r.get("error", {}).get("code") for r in command.results()}
    assert codes == {0: None, 1: "bad_json", 3: "prompt_too_long", 4: "nan_logits", 5: None}
    assert (command.last_line()["requests"], command.last_line()["failed"]) == (5, 3)
    assert "3 requests failed" in command.stderr


def test_messages_use_the_chat_template(command):
    """A conversation reaches the engine as the tokens of the chat template."""
    command.write({"messages": [{"role": "user", "content": "hi"}]})
    assert command() == 0
    used = command.results()[0]["usage"]["prompt_tokens"]
    assert used == len("user: hi\nassistant: ")


def test_few_requests_wait_in_the_engine(command):
    """A long input is tokenized as the engine gets on, not all at once."""
    command.write(*[{"prompt": "a"}] * 100)
    assert command() == 0
    assert len(command.results()) == 100
    assert command.engines[0].most_waiting == 5 * FakeEngine.max_sequences


def test_a_finished_job_needs_no_model(command):
    """Running a finished job again loads nothing, writes nothing and is successful."""
    assert command() == 0
    before = command.output.read_bytes()
    assert command() == 0
    assert command.output.read_bytes() == before
    assert len(command.engines) == 1
    assert (command.last_line()["requests"], command.last_line()["skipped"]) == (0, 3)


def test_failures_of_an_earlier_run_still_count(command):
    """The exit code speaks about the whole job, also when its failures are older."""
    command.write("broken", {"prompt": "ab"})
    assert command() == 1
    assert command() == 1
    assert (command.last_line()["failed"], command.last_line()["skipped"]) == (0, 2)


def test_a_job_of_bad_lines_needs_no_model(command):
    """If no line can run, all get their errors at once."""
    command.write("broken", {"prompt": ""})
    assert command() == 1
    assert [r["error"]["code"] for r in command.results()] == ["bad_json", "empty_prompt"]
    assert command.engines == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OffloadStoreError("the disk is gone", "plug it in"), 1, "error: the disk is gone\n\nhint"),
        (CapacityError("no room"), 1, "flexrun: error: no room"),
        (KeyboardInterrupt(), 130, "running the same command again continues"),
    ],
)
def test_a_run_that_breaks_continues(command, error, code, words):
    """After an error or Ctrl-C finished results stay, and the same command does only the rest."""
    command.write(*[{"prompt": text} for text in ("a", "b", "c", "d", "e")])
    command.next_engine = FakeEngine(break_at_sweep=4, error=error)
    assert command() == code
    assert words in command.stderr
    assert "Traceback" not in command.stderr
    assert command.stdout == ""
    assert command.engines[0].closed
    assert [r["index"] for r in command.results()] == [0, 1]
    command.next_engine = FakeEngine()
    assert command() == 0
    assert sorted(r["index"] for r in command.results()) == [0, 1, 2, 3, 4]
    assert (command.last_line()["requests"], command.last_line()["skipped"]) == (3, 2)
    assert "continuing: 2 requests are finished" in command.stderr


def test_a_killed_run_continues(command):
    """A process that dies in the middle loses and repeats nothing; the result is the same."""
    command.write(*[{"prompt_token_ids": [i]} for i in range(1, 8)])
    script = (
        "import sys\nfrom flexrun import cli\nfrom tests.flexrun.fake_engine import FakeEngine\n"
        "cli.make_engine = lambda config, *others: FakeEngine(break_at_sweep=7)\n"
        "cli._tokenizer_for = lambda job, config: None\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command.flags("--max-tokens", "3")], cwd=ROOT, check=False
    )
    assert done.returncode == 9
    assert [r["index"] for r in command.results()] == [0, 1, 2, 3]
    with open(command.output, "ab") as file:
        file.write(b'{"id": "4", "index": 4, "te')  # as if killed within a write
    assert command() == 0
    continued = command.results()
    assert sorted(r["index"] for r in continued) == list(range(7))
    command.output = command.output.with_name("whole.jsonl")
    assert command() == 0
    assert sorted(command.results(), key=lambda r: r["index"]) == sorted(
        continued, key=lambda r: r["index"]
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--temperature", "warm"], "argument --temperature: invalid float value: 'warm'"),
        (["--temperature", "nan"], "temperature must be finite"),
        (["--max-tokens", "0"], "max_tokens must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--top-k", "-5"], "top_k must be"),
        (["--min-p", "2"], "min_p must be"),
        (["--n", "0"], "n must be"),
        (["--stop", ""], "stop must be"),
        (["--seed", "x"], "argument --seed"),
        (["--device", "tpu"], "argument --device: invalid choice"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--kv-bits", "8"], "argument --kv-bits: invalid choice: 8 (choose from 16, 4)"),
        (["--weights", "device=20,host=70"], "--weights: split"),
        (["--weights", "gpu=100"], "--weights: cannot read 'gpu=100'"),
        (["--micro-batch", "0"], "--micro-batch must be a whole number of at least 1"),
        (["--num-micro-batches", "-1"], "--num-micro-batches must be"),
        (["--max-rows", "0"], "--max-rows must be"),
        (["--max-sequences", "0"], "--max-sequences must be"),
        (["--device-memory", "lots"], "--device-memory: cannot read the size 'lots'"),
        (["--host-memory", "-1"], "--host-memory: cannot read the size"),
        (["--disk-space", "1XB"], "--disk-space: cannot read the size"),
        (["--policy", "plan.json", "--allow-quantization"], "its bits are the policy's"),
        (["--policy", "missing.json"], "--policy: cannot read the policy missing.json"),
        (["--device", "cpu", "--emulate", "capacity=1GiB"], "set --device to emulated"),
        (["--temp", "1"], "unrecognized arguments: --temp"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--input", "missing.jsonl"], "cannot read the input missing.jsonl: No such file"),
        (["--input", "."], "cannot read the input .: Is a directory"),
        (["--output", "."], "not a regular file"),
        (["--output", "missing/out.jsonl"], "directory missing does not exist"),
        (["--model", "no-model-here"], "there is no model at no-model-here"),
        (["--model", "."], "config.json"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused_before_the_model(command, monkeypatch, tmp_path, flags, words):
    """Each wrong setting has exit code 2, a message on stderr without traceback, and no output."""
    monkeypatch.chdir(tmp_path)
    (command.model / "plan.json").write_text("{}")
    flags = [str(command.model / flag) if flag == "plan.json" else flag for flag in flags]
    assert command(*flags) == 2
    assert command.stderr.startswith("flexrun: error: ")
    assert words in command.stderr
    assert "Traceback" not in command.stderr
    assert command.stdout == ""
    assert command.engines == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model"]


def test_required_flags_are_named(command, capsys):
    """Without model, input or output the error names what is missing."""
    assert cli.main(["generate", "--model", "m"]) == 2
    assert "--input, --output" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_output_over_input_is_refused(command):
    """The input is never overwritten."""
    before = command.input.read_bytes()
    assert command("--output", str(command.input)) == 2
    assert "overwrite the input" in command.stderr
    assert command.input.read_bytes() == before


def test_another_job_does_not_append(command):
    """Changed settings or a changed input are named, and the old results stay as they are."""
    assert command() == 0
    before = command.output.read_bytes()
    assert command("--temperature", "0.5", "--seed", "3", "--stop", "x") == 2
    assert "another --temperature, --seed, --stop" in command.stderr
    command.write({"prompt": "other"})
    assert command() == 2
    assert "another --input" in command.stderr
    assert command.output.read_bytes() == before


def test_keys_and_values_of_other_bits_make_another_job(command):
    """The flag is named, and a job of 16 bits has the same fingerprint as before there was one."""
    assert command("--kv-bits", "16", "--group-size", "32") == 0
    sidecar = Path(f"{command.output}.job.json")
    assert not {"--kv-bits", "--group-size"} & json.loads(sidecar.read_text()).keys()
    assert command() == 0
    before = command.output.read_bytes()
    assert command("--kv-bits", "4") == 2
    assert "another --kv-bits" in command.stderr
    policy = command.input.with_name("policy.json")
    policy.write_text('{"kv_bits": 4}')
    assert command("--policy", str(policy)) == 2
    assert "another --kv-bits" in command.stderr
    assert command.output.read_bytes() == before
    command.output.unlink()
    assert command("--policy", str(policy)) == 0
    assert command("--kv-bits", "4", "--policy", "auto") == 0
    for more in ([], ["--kv-bits", "16"]):
        assert command(*more) == 2
        assert "another --kv-bits" in command.stderr
    assert command("--kv-bits", "4", "--group-size", "32") == 2
    assert "another --group-size" in command.stderr
    assert command("--kv-bits", "4", "--weight-bits", "8") == 2
    assert "another --weight-bits" in command.stderr


def test_bits_that_were_chosen_stay(command):
    """Whoever continues the job computes with the bits of its first run, and only with these."""
    command.write(*[{"prompt": text} for text in ("a", "b", "c", "d", "e")])
    command.bits = {"weight_bits": 4, "kv_bits": 16}
    command.next_engine = FakeEngine(break_at_sweep=4, error=KeyboardInterrupt())
    assert command("--allow-quantization") == 130
    assert command.config.free_bits == ("weight_bits", "kv_bits")
    sidecar = Path(f"{command.output}.job.json")
    recorded = sidecar.read_text()
    assert json.loads(recorded)["--weight-bits"] == 4
    assert not {"--kv-bits", "--allow-quantization"} & json.loads(recorded).keys()
    command.bits = {"weight_bits": 16, "kv_bits": 4}  # another machine, another plan
    command.next_engine = FakeEngine(break_at_sweep=2, error=KeyboardInterrupt())
    assert command("--allow-quantization") == 130
    assert (command.config.weight_bits, command.config.kv_bits) == (4, 16)
    assert "as the job began: weights in 4 bits, KV cache as computed" in command.stderr
    for more in ([], ["--allow-quantization", "--weight-bits", "16"]):
        assert command(*more) == 2
        assert "another --weight-bits, --head-bits" in command.stderr
    assert command("--allow-quantization", "--temperature", "1") == 2
    assert "belongs to a job with another --temperature\n" in command.stderr
    sidecar.write_text(recorded.replace('"--weight-bits": 4', '"--weight-bits": 3'))
    assert command("--allow-quantization") == 2
    assert "belongs to a job with another " in command.stderr
    assert "--weight-bits" in command.stderr
    sidecar.write_text(recorded)
    command.next_engine = FakeEngine()
    assert command("--allow-quantization") == 0
    assert sidecar.read_text() == recorded
    assert sorted(r["index"] for r in command.results()) == [0, 1, 2, 3, 4]
    assert command("--weight-bits", "4") == 0


@pytest.mark.parametrize("flags", [[], ["--weight-bits", "8", "--kv-bits", "4"]], ids=" ".join)
def test_a_job_with_given_bits_keeps_them(command, flags):
    """Allowing others later changes nothing: those of the finished results are known."""
    command.write(*[{"prompt": text} for text in ("a", "b", "c", "d", "e")])
    command.next_engine = FakeEngine(break_at_sweep=4, error=KeyboardInterrupt())
    assert command(*flags) == 130
    command.bits = {"weight_bits": 4, "kv_bits": 16}
    command.next_engine = FakeEngine()
    assert command("--allow-quantization") == 0
    given = (8, 4) if flags else (16, 16)
    assert (command.config.weight_bits, command.config.kv_bits) == given


def test_bits_are_settled_before_the_first_result(command):
    """A run that is killed while its weights are quantized has chosen; one before has not."""
    command.bits = {"weight_bits": 8, "kv_bits": 4}
    script = (
        "import os, sys\nfrom flexrun import cli\n"
        "def killed(config, tokenizer, on_bits):\n"
        "    WHAT\n"
        "    os._exit(9)\n"
        "cli.make_engine = killed\n"
        "cli._tokenizer_for = lambda job, config: None\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command.write({"prompt_token_ids": [1]})
    flags = command.flags("--max-tokens", "3", "--allow-quantization")
    chosen = "on_bits({'weight_bits': 4, 'kv_bits': 16})"
    for what, bits in ((chosen, (4, 16)), ("pass", (None, None))):
        killed = [sys.executable, "-c", script.replace("WHAT", what), *flags]
        assert subprocess.run(killed, cwd=ROOT, check=False).returncode == 9
        assert command.output.read_bytes() == b""
        assert command("--allow-quantization") == 0
        assert (command.config.weight_bits, command.config.kv_bits) == bits
        command.output.unlink()
    assert command("--allow-quantization") == 0
    assert command.config.free_bits  # who deletes the results starts over


def test_plans_know_the_longest_line(command):
    """Of many, of which only some are tokenized for a mean; one that cannot run does not count."""
    ids: dict[str, Any] = {"prompt_token_ids": [1, 2]}
    lines = [ids for _ in range(1000)]
    lines[500] = {"prompt": "a" * 800}  # a token each, and there are as many ids in a quarter
    lines[502] = {"prompt_token_ids": [1] * 300, "max_tokens": 700}
    lines[503] = {"prompt_token_ids": [1] * 1500, "max_tokens": -1}
    lines[506] = {"prompt_token_ids": [1] * 3000}  # beyond the context
    lines[505] = {"messages": [{"role": "user", "content": "b" * 400}], "max_tokens": 9}
    command.write(*lines)
    command()
    found = command.config.job_lengths
    assert found.most_tokens == 1000
    assert max(found.prompts) == 2
    command.output.unlink()
    Path(f"{command.output}.job.json").unlink()
    lines[502] = ids
    command.write(*lines)
    command()
    assert command.config.job_lengths.most_tokens == 800 + 3


def test_bits_are_chosen_for_the_jobs_own_lengths(command):
    """Completions are counted each, and lines that cannot run not at all."""
    lines = [{"prompt": "abcd", "n": 3, "max_tokens": 6}, {"prompt_token_ids": [1, 2]}, "broken"]
    command.write(*lines)
    assert command("--allow-quantization") == 1
    lengths = JobLengths(4, 3.0, 5.25, 6, prompts=(4, 2), most_tokens=10)
    assert command.config.job_lengths == lengths
    command.output.unlink()
    assert command() == 1
    assert command.config.job_lengths == lengths  # every plan is for them
    command.output.unlink()
    Path(f"{command.output}.job.json").unlink()
    path = command.output.with_suffix(".policy")
    path.write_text(Policy().to_json())
    assert command("--policy", str(path)) == 1
    assert command.config.job_lengths is None  # nothing is planned


def test_settings_that_keep_the_results_may_change(command):
    """An interrupted job may continue with another policy or on another device."""
    command.next_engine = FakeEngine(break_at_sweep=4, error=KeyboardInterrupt())
    assert command() == 130
    command.next_engine = FakeEngine()
    assert command("--max-rows", "99", "--device", "cpu", "--weights", "host=100") == 0


def test_a_model_that_does_not_fit_leaves_nothing(command, monkeypatch, tmp_path):
    """If the engine cannot start, the exit code is 2 and no output file is left."""

    def refuse(*_):
        raise CapacityError("12 GiB are missing", "raise --host-memory")

    monkeypatch.setattr(cli, "make_engine", refuse)
    assert command() == 2
    assert command.stderr == "flexrun: error: 12 GiB are missing\n\nhint: raise --host-memory\n"
    assert not command.output.exists()


def test_ctrl_c_while_loading_leaves_nothing(command, monkeypatch):
    """Ctrl-C before the first sweep has exit code 130 and no traceback."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_engine", interrupt)
    assert command() == 130
    assert command.stderr == "flexrun: interrupted\n"
    assert not command.output.exists()


def test_no_tokenizer_is_needed_for_token_ids(command, monkeypatch):
    """Without a tokenizer a job of token ids runs, and one with texts is refused."""

    def none(directory):
        raise UsageError("cannot load a tokenizer")

    monkeypatch.setattr(Tokenizer, "load", none)
    assert command() == 2
    assert "cannot load a tokenizer" in command.stderr
    command.write({"prompt_token_ids": [1, 2]})
    assert command() == 0
    assert "texts will be empty" in command.stderr


def test_flags_become_settings(tmp_path):
    """Every flag reaches its field."""
    policy = tmp_path / "policy.json"
    policy.write_text('{"max_rows": 64}')
    flags = (
        "generate --model m --input i --output o --device emulated --dtype float32 --max-tokens 9 "
        "--temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 3 --stop A --stop B "
        f"--ignore-eos --n 2 --policy {policy} --weights host=100 --kv-cache device=50,host=50 "
        "--micro-batch 8 --num-micro-batches 2 --max-rows 32 --max-sequences 5 "
        "--device-memory 1GiB --host-memory 2G --disk-space 3MB --offload-dir d --no-overlap "
        "--emulate capacity=1MiB --kv-bits 4 --group-size 32"
    )
    arguments = build_parser("0").parse_args(flags.split())
    config = engine_config(vars(arguments), flag_of)
    assert config.policy is not None
    assert (config.policy.max_rows, config.max_rows) == (64, 32)
    assert (config.weights, config.kv_cache) == (Split(host=100), Split(device=50, host=50))
    assert (config.micro_batch_rows, config.num_micro_batches, config.max_sequences) == (8, 2, 5)
    assert (config.kv_bits, config.quantization.kv_bits, config.quantization.group) == (4, 4, 32)
    sizes = (config.device_memory, config.host_memory, config.disk_space)
    assert sizes == (2**30, 2 * 10**9, 3 * 10**6)
    assert (config.offload_dir, config.overlap, config.emulate) == (
        Path("d"),
        False,
        "capacity=1MiB",
    )
    assert (config.device, config.dtype, config.seed) == ("emulated", "float32", 3)
    assert sampling_params(arguments) == replace(
        JOB_DEFAULTS,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        stop=("A", "B"),
        ignore_eos=True,
        n=2,
    )


def test_defaults_are_those_of_the_dataclasses():
    """Without flags the settings are the dataclasses' own: greedy, 256 tokens, all automatic."""
    required = ["generate", "--model", "m", "--input", "i", "--output", "o", "--policy", "auto"]
    arguments = build_parser("0").parse_args(required)
    assert sampling_params(arguments) == JOB_DEFAULTS
    assert engine_config(vars(arguments)) == engine_config({"model": "m"})


def test_help_and_errors_come_without_torch():
    """`--help` and wrong flags do not wait for torch or transformers."""
    code = (
        "import sys, flexrun.cli\n"
        "assert flexrun.cli.main(['generate', '--model', 'm']) == 2\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
    module = [sys.executable, "-m", "flexrun", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(module, env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert b"generate" in done.stdout
