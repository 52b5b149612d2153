"""The command line's flags, and how texts become settings (also for `flexrun.LLM`)."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flexrun.config import DEVICES, DTYPES, EngineConfig
from flexrun.errors import FlexrunError, UsageError
from flexrun.request import SamplingParams
from offload.tiers import Split, parse_size
from policy_search.flags import add_quantization_flags, add_workload_flags, count
from policy_search.policy import CHOICES, Policy
from policy_search.workload import JobLengths

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

JOB_DEFAULTS = SamplingParams(temperature=0.0, max_tokens=256)
"""A batch job is greedy unless asked otherwise: the safe choice, and the reproducible one."""

_PARSERS: dict[str, Callable[[str], Any]] = {
    "policy": lambda text: None if text == "auto" else Policy.load(Path(text)),
    "weights": Split.parse,
    "kv_cache": Split.parse,
    "activations": Split.parse,
    "device_memory": parse_size,
    "host_memory": parse_size,
    "disk_space": parse_size,
    "offload_dir": Path,
    "trace": Path,
}
_FIELD_OF = {"--micro-batch": "micro_batch_rows"}
_FLAG_OF = {field: flag for flag, field in _FIELD_OF.items()}
_DEFAULTS: dict[str, Any] = asdict(JOB_DEFAULTS) | {f.name: f.default for f in fields(EngineConfig)}
_DEFAULTS["stop"] = None  # argparse appends to a list of its own


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot read like every other wrong setting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def build_parser(version: str) -> argparse.ArgumentParser:
    """The parser of `flexrun` with all its subcommands."""
    parser = _Parser(
        prog="flexrun",
        description="Run large language models over big batches of prompts.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flexrun {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="complete every prompt of a JSONL file",
        description="Complete every prompt of a JSONL file. Killed or interrupted, the same "
        "command continues where it stopped. The last line on stdout is one JSON object.",
        allow_abbrev=False,
    )
    _add_job_flags(generate)
    _add_sampling_flags(generate)
    _add_machine_flags(generate)
    _add_policy_flags(generate)
    add_quantization_flags(generate, planned=True)
    check = commands.add_parser(
        "check",
        help="say whether a model's architecture can be run exactly",
        description="Say whether a model's architecture can be run exactly.",
        allow_abbrev=False,
    )
    check.add_argument("--model", required=True, help="directory, hub id or .gguf file")
    _add_prepare(commands)
    _add_bench(commands)
    _add_perplexity(commands)
    return parser


def _add_perplexity(commands: Any) -> None:
    parser = commands.add_parser(
        "eval-ppl",
        help="perplexity of a text, to see what a setting costs in quality",
        description="Compute the perplexity of a text over sliding windows. The last line on "
        "stdout is one JSON object.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--model", required=True, help="directory, hub id or .gguf file")
    add("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text")
    add("--context", type=count, default=512, metavar="N", help="tokens of a window (%(default)s)")
    add("--stride", type=count, metavar="N", help="tokens between windows; default: half a window")
    text = "rows of a window computed together; default: a micro-batch's, or a packed page's"
    add("--chunk", type=count, metavar="N", help=text)
    add("--text-tokens", type=count, metavar="N", help="use only the text's first N tokens")
    _add_machine_flags(parser)
    _add_policy_flags(parser)
    add_quantization_flags(parser)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="run a job of published prompt and output lengths, with random tokens",
        description="Run a job of published prompt and output lengths, with random tokens. The "
        "last line on stdout is one JSON object.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("job")
    group.add_argument("--model", required=True, help="directory, hub id or .gguf file")
    add_workload_flags(group, requests=256)
    _add_machine_flags(parser)
    _add_policy_flags(parser)
    add_quantization_flags(parser, planned=True)


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="write the weights that jobs read from disk ahead of the first job",
        description="Write a model's weights to the offload directory in the order and type in "
        "which jobs read them. A job does this itself where it has to; the copy is kept and "
        "serves all later jobs.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="directory, hub id or .gguf file")
    add = partial(_add_flag, parser)
    add("--dtype", "type of weights and compute (%(default)s)", choices=DTYPES)
    add("--offload-dir", "directory for prepared weights; default: the user's cache", metavar="DIR")
    add("--disk-space", "budget, such as 200GiB; default: what is free", metavar="SIZE")
    help_text = "write a copy even of weights that jobs could read where they are"
    parser.add_argument("--copy", action="store_true", help=help_text)
    add_quantization_flags(parser, kv_cache=False)


def _add_job_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("job").add_argument
    add("--model", required=True, help="directory, hub id or .gguf file")
    add("--input", required=True, type=Path, metavar="FILE", help="JSONL, one request per line")
    add("--output", required=True, type=Path, metavar="FILE", help="JSONL, results as they finish")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "Each line of the input may override these.")
    add = partial(_add_flag, group)
    add("--max-tokens", "most tokens to generate (%(default)s)", type=int, metavar="N")
    add("--temperature", "0 is greedy, and the default", type=float, metavar="T")
    add("--top-p", "keep the likeliest tokens up to this probability", type=float, metavar="P")
    add("--top-k", "keep the K likeliest tokens; 0 keeps all", type=int, metavar="K")
    add("--min-p", "drop tokens below this share of the likeliest", type=float, metavar="P")
    add("--stop", "end at this text; repeatable", action="append", metavar="TEXT")
    add("--ignore-eos", "go on after the end-of-sequence token", action="store_true")
    add("--n", "completions per prompt (%(default)s)", type=int, metavar="N")
    add("--seed", "random state of the job (%(default)s)", type=int, metavar="S")


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    add = partial(_add_flag, parser.add_argument_group("machine"))
    add("--device", "where to compute (%(default)s)", choices=DEVICES)
    add("--dtype", "type of weights and compute (%(default)s)", choices=DTYPES)
    add("--device-memory", "budget, such as 16GiB; default: what is free", metavar="SIZE")
    add("--host-memory", "likewise for RAM", metavar="SIZE")
    add("--disk-space", "likewise for the offload directory", metavar="SIZE")
    text = "directory for prepared weights and for KV pages on disk; default: the user's cache"
    add("--offload-dir", text, metavar="DIR")
    add("--emulate", "the machine of --device emulated", metavar="TEXT")


def _add_policy_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy", "What lives where, and the size of a sweep.")
    add = partial(_add_flag, group)
    add("--policy", "auto, the default, or a policy's file", metavar="auto|FILE.json")
    add("--weights", "such as device=20,host=80", metavar="SPLIT")
    add("--kv-cache", "such as device=50,host=30,disk=20", metavar="SPLIT")
    add("--activations", "of waiting micro-batches, such as host=100", metavar="SPLIT")
    add("--micro-batch", "most rows in one layer call", type=int, metavar="ROWS")
    add("--num-micro-batches", "cut every sweep into so many", type=int, metavar="K")
    add("--max-rows", "most rows of one sweep", type=int, metavar="ROWS")
    add("--max-sequences", "most sequences running at once", type=int, metavar="N")
    text = "rows of running sequences attend to KV on host there, or move it to the device (auto)"
    add("--attention", text, choices=CHOICES["attention"])
    text = "prompts ride along (continuous), or for comparison: phases apart, or FlexGen's block"
    add("--scheduler", text, choices=CHOICES["scheduler"])
    text = "who waits joins by the most tokens to generate (longest) or as in the input"
    add("--order", text, choices=CHOICES["order"])
    text = "guess tokens from the sequence itself where rows cost nothing (lookup), or do not"
    add("--speculation", text, choices=CHOICES["speculation"])
    text = "a sequence without KV pages left: swap them to a slower tier, or recompute them (auto)"
    add("--preemption", text, choices=CHOICES["preemption"])
    add("--trace", "write a Chrome trace: what each link and compute did when", metavar="FILE")
    help_text = "transfer and compute one after another; same tokens, slower"
    group.add_argument("--no-overlap", dest="overlap", action="store_false", help=help_text)


def _add_flag(group: Any, flag: str, text: str, **options: Any) -> None:
    name = _FIELD_OF.get(flag, flag.removeprefix("--").replace("-", "_"))
    group.add_argument(flag, dest=name, default=_DEFAULTS[name], help=text, **options)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of lines that say nothing else. Raises `UsageError`."""
    given = {f.name for f in fields(SamplingParams)} & vars(arguments).keys() - {"seed"}
    return replace(JOB_DEFAULTS, **{name: getattr(arguments, name) for name in given})


def engine_config(values: dict[str, Any], spell: Callable[[str], str] = str) -> EngineConfig:
    """Settings from values or their texts (`"device=20,host=80"`, `"16GiB"`, a policy's file).

    `spell` turns a field's name into what the user wrote. Raises `FlexrunError`s that name it.
    """
    settings = {f.name: values[f.name] for f in fields(EngineConfig) if f.name in values}
    for name, parse in _PARSERS.items():
        if isinstance(settings.get(name), str):
            settings[name] = _parsed(spell(name), parse, settings[name])
    config = EngineConfig(**settings)
    _check_choice(spell("device"), config.device, DEVICES)
    _check_choice(spell("dtype"), config.dtype, DTYPES)
    for name, value in config.overrides.items():
        if name in CHOICES:
            _check_choice(spell(name), value, CHOICES[name])
        elif name == "keep":
            if not isinstance(value, str):
                raise UsageError(f"{spell(name)} must be a regular expression, not {value!r}")
        elif not isinstance(value, Split) and (type(value) is not int or value < 1):
            raise UsageError(f"{spell(name)} must be a whole number of at least 1, not {value!r}")
    _check_allowed(config, spell)
    replace(config.policy or Policy(), **config.overrides)  # to fail before the model is loaded
    if config.emulate is not None and config.device != "emulated":
        raise UsageError(
            f"{spell('emulate')} describes an emulated device, but the device is {config.device}",
            hint=f"set {spell('device')} to emulated",
        )
    return config


def _check_allowed(config: EngineConfig, spell: Callable[[str], str]) -> None:
    allowed = spell("allow_quantization")
    if not isinstance(config.allow_quantization, bool):
        raise UsageError(f"{allowed} must be true or false, not {config.allow_quantization!r}")
    if config.job_lengths is not None and not isinstance(config.job_lengths, JobLengths):
        raise UsageError(
            f"{spell('job_lengths')} must be a policy_search.workload.JobLengths, not "
            f"{config.job_lengths!r}"
        )
    if (job := config.job_lengths) is not None and not (
        isinstance(job.sequences, int) and min(job.sequences, job.prompt, job.output) >= 1
    ):
        raise UsageError(
            f"{spell('job_lengths')} must be of one sequence or more, with a token of prompt and "
            f"output or more each, not {job!r}"
        )
    if job is not None and (type(job.most_tokens) is not int or job.most_tokens < 0):
        raise UsageError(
            f"the most_tokens of {spell('job_lengths')} must be a whole number, not "
            f"{job.most_tokens!r}",
            hint="it counts a sequence's prompt and all that it may generate; 0 says nothing",
        )
    if config.allow_quantization and config.policy is not None:
        raise UsageError(
            f"{allowed} lets the plan choose bits, but with {spell('policy')} the plan is made: "
            "its bits are the policy's",
            hint=f"leave out {allowed}, or {spell('policy')} to have a plan made (`policy-search "
            "--allow-quantization -o FILE` writes one)",
        )


def flag_of(name: str) -> str:
    """The flag of a field of `EngineConfig`."""
    return _FLAG_OF.get(name, "--" + name.replace("_", "-"))


def _parsed(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except FlexrunError as error:
        raise UsageError(f"{name}: {error.message}", error.hint) from None


def _check_choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices or type(value) not in {type(each) for each in choices}:
        raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
