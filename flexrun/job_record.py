"""What a job's results depend on, and what an earlier run of it has settled.

Bits that a plan may choose are chosen once: they are in the record that lies beside the results,
and whoever continues the job computes with them, whatever a plan would choose by then.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.selection import PLAIN_BITS
from flexrun.arguments import flag_of
from flexrun.errors import RequestError
from flexrun.job_file import token_ids_of
from flexrun.result_file import recorded_job
from policy_search.policy import CHOICES
from policy_search.workload import JobLengths

if TYPE_CHECKING:
    from flexrun.config import EngineConfig
    from flexrun.job_file import JobFile, JobLine
    from flexrun.tokenizer import Tokenizer

_TOKENIZED = 256
"""Lines that say how long prompts are."""
_LARGEST = 8
"""Lines among which the longest sequence is looked for."""
_BYTES_OF_TOKEN = 4
"""Of text, about: which lines are the largest has to be known before they are tokenized."""


def fingerprint(job: JobFile, config: EngineConfig) -> dict[str, Any]:
    """All that decides about the results, under the names that the user knows."""
    path = Path(config.model)
    sampling = {flag_of(name): value for name, value in asdict(job.defaults).items()}
    fingerprint = {
        "--input": job.sha256,
        "--model": str(path.resolve()) if path.exists() else config.model,
        "--dtype": config.dtype,
        **sampling,
        "--seed": config.seed,
    }
    found = config.quantization
    if found.any:
        fingerprint |= {
            flag_of("weight_bits"): found.weight_bits,
            flag_of("head_bits"): found.head_bits,
            flag_of("group_size"): found.group,
            flag_of("keep"): found.keep,
        }
    if found.kv_bits < PLAIN_BITS:
        fingerprint |= {
            flag_of("kv_bits"): found.kv_bits,
            flag_of("group_size"): found.group,
        }
    if config.free_bits:
        fingerprint |= {flag_of("allow_quantization"): True}  # not settled yet
    return json.loads(json.dumps(fingerprint))  # as the sidecar gives it back: tuples are lists


def with_recorded_bits(job: JobFile, config: EngineConfig, output: Path) -> EngineConfig:
    """`config` with the bits that an earlier run of this job has, where it leaves them open.

    Those of a run that was killed before its first result, too: its weights are prepared.
    """
    recorded = recorded_job(output)
    if not config.free_bits or recorded is None or not output.is_file():
        return config
    bits = {name: recorded.get(flag_of(name), PLAIN_BITS) for name in config.free_bits}
    if any(found not in CHOICES[name] for name, found in bits.items()):
        return config  # no record of ours: refused for what differs
    settled = replace(config, **bits)
    if fingerprint(job, settled) == recorded:
        return settled
    # Where another job's results are, the refusal names what differs, which is not the bits.
    unsettled = flag_of("allow_quantization") in recorded
    return settled if output.stat().st_size and not unsettled else config


def job_lengths(
    job: JobFile, tokenizer: Tokenizer | None, context_length: int | None = None
) -> JobLengths | None:
    """Sequences that run at once are counted each; None if no line can run.

    Outputs are taken to be as long as they may be, prompts like those of some lines from all over
    the file: tokenizing all of them would take as long as the job's own tokenizing. The longest
    sequence is looked for among these and those that are largest by their prompts' bytes and their
    outputs; prompts that fill the `context_length` fail whatever the plan.
    """
    prompts: list[int] = []
    found: list[tuple[int, int]] = []
    largest: list[tuple[int, int, JobLine, int]] = []
    sequences = tokens = longest = 0
    step = max(1, job.num_requests // _TOKENIZED)
    for number, line in enumerate(job):
        params = line.sampling_params
        if params is None:
            continue
        sequences += params.n
        tokens += params.n * params.max_tokens
        longest = max(longest, params.max_tokens)
        size = _size(line.prompt) + params.max_tokens
        heappush(largest, (size, number, line, params.max_tokens))
        if len(largest) > _LARGEST:
            heappop(largest)
        if (number % step == 0 or not prompts) and (count := _count(line, tokenizer)):
            prompts.append(count)
            found.append((count, params.max_tokens))
    if not prompts:
        return None
    found += [(_count(line, tokenizer), output) for *_, line, output in largest]
    most = max(
        (sum(each) for each in found if 0 < each[0] < (context_length or math.inf)), default=0
    )
    mean = sum(prompts) / len(prompts)
    return JobLengths(sequences, mean, tokens / sequences, longest, tuple(prompts), most)


def _count(line: JobLine, tokenizer: Tokenizer | None) -> int:
    """Tokens of its prompt; none of one that cannot be tokenized: the line's own failure, later."""
    try:
        return len(token_ids_of(line.prompt, tokenizer))
    except RequestError:
        return 0


def _size(prompt: str | tuple[int, ...] | list[dict[str, Any]]) -> int:
    """Tokens, about."""
    if isinstance(prompt, tuple):
        return len(prompt)
    texts = [prompt] if isinstance(prompt, str) else [each["content"] for each in prompt]
    return sum(len(text.encode()) for text in texts) // _BYTES_OF_TOKEN
