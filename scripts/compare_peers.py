"""flexrun against the engines that are installed: same model, prompts, tokens and memory cap.

Every run is a process of its own under a memory cap that counts the page cache, after the page
cache was dropped: flexrun with its weights on disk, and each peer with left-padded static batches,
sorted by length, at the best of several batch sizes. Engines take turns, in alternating order.
Beside them the disk and matrix-product rates are measured, from which each engine's own bound
follows. Standard output is a Markdown table and, as its last line, one JSON object with everything.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory_cap import METHODS, CapError, CappedRun, parse_size, run_capped

PEERS = {
    "accelerate": ("transformers", "accelerate"),
    "transformers": ("transformers",),
    "airllm": ("airllm",),
    "llamacpp": ("llama_cpp",),
}
"""The peers, and the modules that each needs."""
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DISK_BYTES = 2 << 30
CHUNK = 16 << 20
MOST_ROWS = 2048  # of a matrix product that is measured; the rate is the same above it
PAD = 0
WORKER = "--worker"
FIND_MISSING = (
    "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])"
)


class CompareError(Exception):
    """What is wrong with the setting, and what to do about it."""


@dataclass(frozen=True)
class Model:
    """What the comparison has to know of a checkpoint."""

    directory: Path
    dtype: str
    vocab: int
    hidden: int
    ffn: int
    parameters: int
    head: int
    """Parameters of the output head."""
    body: int
    """Parameters that every row is multiplied with."""

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))

    def nbytes(self, dtype: str) -> int:
        """Of all weights in `dtype`."""
        return self.parameters * (4 if dtype == "float32" else 2)

    @classmethod
    def read(cls, directory: Path) -> Model:
        """From config.json and the heads of the safetensors files. Raises `CompareError`."""
        files = sorted(directory.glob("*.safetensors"))
        if not files or not (directory / "config.json").is_file():
            raise CompareError(
                f"{directory} has no config.json with safetensors files\nhint: name a checkpoint, "
                "or make one: scripts/make_random_model.py tiny DIRECTORY"
            )
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        sizes, dtypes = {}, set()
        for path in files:
            for name, entry in _safetensors_header(path).items():
                sizes[name] = math.prod(entry["shape"])
                dtypes.add(entry["dtype"])
        if not dtypes <= WIDTHS.keys():
            raise CompareError(
                f"{directory} has weights of types {sorted(dtypes)}, which the "
                "comparison cannot count\nhint: name an unquantized checkpoint"
            )
        table = sum(n for name, n in sizes.items() if name.endswith("embed_tokens.weight"))
        head = sum(n for name, n in sizes.items() if name.endswith("lm_head.weight"))
        total = sum(sizes.values())
        return cls(
            directory,
            NAMES[max(dtypes, key=lambda dtype: WIDTHS[dtype])],
            config["vocab_size"],
            config["hidden_size"],
            config["intermediate_size"],
            total,
            head or table,
            total - table - head,
        )


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


@dataclass
class Measurement:
    """One run of one engine."""

    engine: str
    batch: int | None
    dtype: str = ""
    failure: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    read_bytes: int = 0
    """While generating."""
    decode_rows: float = 0.0
    """Rows of the products of one decode step."""
    extrapolated: bool = False
    peak_rss_bytes: int = 0
    peak_anonymous_bytes: int = 0
    peak_cgroup_bytes: int | None = None
    completions: list[list[int]] | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, Any]:
        """For the JSON object."""
        facts = asdict(self) | {"tokens_per_second": self.tokens_per_second}
        facts.pop("completions")
        return facts


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def make_prompts(count: int, lengths: tuple[int, int], vocab: int, seed: int) -> list[list[int]]:
    """Distinct prompts of token ids; `lengths` are the shortest and the longest."""
    draw = random.Random(seed)
    first = min(3, vocab - 1)
    return [
        [draw.randrange(first, vocab) for _ in range(draw.randint(*lengths))] for _ in range(count)
    ]


# ------------------------------------------------------------------ inside a peer's own process


def worker(spec: dict[str, Any]) -> None:
    """Load, generate, and print what was measured. Runs under the peer's interpreter."""
    if spec["engine"] == "rates":
        print(json.dumps(matmul_rates(spec)))
        return
    start = time.perf_counter()
    generate = LOADERS[spec["engine"]](spec)
    loaded = time.perf_counter() - start
    batches = [] if spec.get("prepare") else [generate(ids) for ids in spec["batches"]]
    print(json.dumps({"load_seconds": loaded, "batches": batches}))


def disk_bytes() -> int:
    """What this process has read from disk itself."""
    text = Path("/proc/self/io").read_text()
    return next(int(x.split()[1]) for x in text.splitlines() if x.startswith("read_bytes"))


def matmul_rates(spec: dict[str, Any]) -> dict[str, float]:
    """FLOP/s of a linear layer of the model's shape, for every `dtype:rows`."""
    import torch

    rates = {}
    for case in spec["cases"]:
        dtype, rows = case.split(":")
        x = torch.randn(int(rows), spec["hidden"]).to(getattr(torch, dtype))
        w = torch.randn(spec["ffn"], spec["hidden"]).to(getattr(torch, dtype))
        times: list[float] = []
        while len(times) < 3 or (sum(times) < 1.0 and len(times) < 500):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        rates[case] = 2.0 * int(rows) * spec["hidden"] * spec["ffn"] / min(times)
    return rates


Generate = Callable[[list[list[int]]], dict[str, Any]]


def load_transformers(spec: dict[str, Any]) -> Generate:
    """transformers with all weights in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec["dtype"])
    return static_batches(AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype), spec)


def load_accelerate(spec: dict[str, Any]) -> Generate:
    """transformers with Accelerate's disk offload, which reads the checkpoint's own files."""
    import torch
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"device_map": {"": "disk"}}
    if spec["resident"]:
        where = {"device_map": "auto", "max_memory": {"cpu": spec["resident"]}}
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=getattr(torch, spec["dtype"]), offload_folder=spec["folder"], **where
    )
    return static_batches(model, spec)


def load_airllm(spec: dict[str, Any]) -> Generate:
    """AirLLM, layer by layer from files of its own, which its first load writes."""
    import torch
    from airllm import AutoModel

    model = AutoModel.from_pretrained(
        spec["model"],
        device="cpu",
        dtype=getattr(torch, spec["dtype"]),
        max_seq_len=spec["context"],
        layer_shards_saving_path=spec["folder"],
    )
    return static_batches(model, spec)


def static_batches(model: Any, spec: dict[str, Any]) -> Generate:
    """Left-padded greedy generation of a fixed number of tokens, with the time of the first."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    inner = model if hasattr(model, "generation_config") else model.model
    inner.generation_config.eos_token_id = None
    marks: list[tuple[float, int]] = []

    class Mark(StoppingCriteria):
        """Never stops; notes when the first token was there."""

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            if len(marks) == 1:
                marks.append((time.perf_counter(), disk_bytes()))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def generate(prompts: list[list[int]]) -> dict[str, Any]:
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        marks[:] = [(time.perf_counter(), disk_bytes())]
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=spec["new_tokens"],
                do_sample=False,
                use_cache=True,
                pad_token_id=PAD,
                stopping_criteria=StoppingCriteriaList([Mark()]),
            )
        marks.append((time.perf_counter(), disk_bytes()))
        return batch_facts(marks, output[:, width:].tolist())

    return generate


def load_llamacpp(spec: dict[str, Any]) -> Generate:
    """llama.cpp, mapping its file; the Python package runs one sequence at a time."""
    import llama_cpp

    model = llama_cpp.Llama(
        spec["gguf"], n_ctx=spec["context"], n_threads=os.cpu_count(), verbose=False
    )

    def generate(prompts: list[list[int]]) -> dict[str, Any]:
        assert len(prompts) == 1
        marks, tokens = [(time.perf_counter(), disk_bytes())], []
        for token in model.generate(prompts[0], temp=0.0):
            tokens.append(int(token))
            if len(tokens) == 1:
                marks.append((time.perf_counter(), disk_bytes()))
            if len(tokens) == spec["new_tokens"]:
                break
        marks.append((time.perf_counter(), disk_bytes()))
        return batch_facts(marks, [tokens])

    return generate


def batch_facts(marks: list[tuple[float, int]], tokens: list[list[int]]) -> dict[str, Any]:
    """Times and bytes up to the first token of a batch, and after it."""
    (t0, b0), (t1, b1), (t2, b2) = marks
    return {"first": [t1 - t0, b1 - b0], "rest": [t2 - t1, b2 - b1], "tokens": tokens}


LOADERS: dict[str, Callable[[dict[str, Any]], Generate]] = {
    "transformers": load_transformers,
    "accelerate": load_accelerate,
    "airllm": load_airllm,
    "llamacpp": load_llamacpp,
}


# ------------------------------------------------------------------------- the machine's rates


def drop_page_cache(paths: Iterable[Path], how: str) -> str:
    """Forget what is cached of the files, or of everything; says which."""
    if how == "never":
        return "not dropped"
    os.sync()
    if how in ("auto", "system"):
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return "drop_caches"
        except OSError as error:
            if how == "system":
                raise CompareError(
                    f"/proc/sys/vm/drop_caches: {error.strerror}\nhint: run as root, or use "
                    "--drop-cache files"
                ) from None
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
    return "posix_fadvise of the model's files"


def disk_rate(files: list[Path]) -> dict[str, Any]:
    """Bytes/s of two threads reading the model's files, without the page cache if possible."""
    try:
        return {"bytes_per_second": _read_all(files, os.O_DIRECT), "method": "O_DIRECT"}
    except OSError:
        drop_page_cache(files, "files")
        return {"bytes_per_second": _read_all(files, 0), "method": "buffered, after fadvise"}


def _read_all(files: list[Path], flags: int) -> float:
    chunks = [(file, at) for file in files for at in range(0, file.stat().st_size, CHUNK)]
    chunks = chunks[: max(1, DISK_BYTES // CHUNK)]
    waiting, lock = iter(chunks), threading.Lock()
    total, errors = [0], []

    def read() -> None:
        buffer = mmap.mmap(-1, CHUNK)
        try:
            while True:
                with lock:
                    chunk = next(waiting, None)
                if chunk is None:
                    return
                descriptor = os.open(chunk[0], os.O_RDONLY | flags)
                try:
                    got = os.preadv(descriptor, [buffer], chunk[1])
                finally:
                    os.close(descriptor)
                with lock:
                    total[0] += got
        except OSError as error:
            errors.append(error)

    start = time.perf_counter()
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return total[0] / (time.perf_counter() - start)


# --------------------------------------------------------------------------------- the runs


class Comparison:
    """The setting of all runs, and what they gave."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work = given, work
        self.model = Model.read(given.model)
        self.limit = parse_size(given.memory_cap)
        self.resident = parse_size(given.resident) if given.resident else 0
        self.prompts = make_prompts(
            given.prompts, given.prompt_tokens, self.model.vocab, given.seed
        )
        self.measurements: list[Measurement] = []
        self.skipped: list[Measurement] = []
        self.cache = self.cap_method = ""
        self._ready: set[str] = set()
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    @property
    def peer_dtype(self) -> str:
        return self.given.peer_dtype or self.model.dtype

    def run_everything(self) -> None:
        """Round 0 tries all batch sizes; the later rounds take each engine's best, in turns."""
        engines = ["flexrun", *(peer for peer in self.given.peers if self._can_run(peer))]
        for engine in engines:
            for batch in self._batches(engine):
                self._measure(engine, batch)
        for number in range(1, self.given.repeats):
            for engine in reversed(engines) if number % 2 else engines:
                if best := self.best(engine):
                    self._measure(engine, best[0].batch)

    def _batches(self, engine: str) -> list[int | None]:
        if engine == "flexrun":
            return [None]
        if engine == "llamacpp":
            return [1]
        return sorted({min(batch, len(self.prompts)) for batch in self.given.batch_sizes})

    def _can_run(self, peer: str) -> bool:
        reason = self._obstacle(peer)
        if reason is not None:
            say(f"{peer}: {reason}")
            self.skipped.append(Measurement(peer, None, self.peer_dtype, failure=reason))
        return reason is None

    def _obstacle(self, peer: str) -> str | None:
        """Why a peer cannot run at all."""
        command = [self.given.peer_python, "-c", FIND_MISSING, *PEERS[peer]]
        try:
            missing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise CompareError(
                f"--peer-python {self.given.peer_python} does not run: {error}"
            ) from None
        if missing.strip():
            return f"{missing.split()[0]} is not installed"
        if peer == "llamacpp" and self.given.gguf is None:
            return "needs the model as --gguf FILE"
        needed = self.model.nbytes(self.peer_dtype)
        if peer == "transformers" and needed > self.limit:
            return f"does not fit: weights {gib(needed)} GiB, cap {gib(self.limit)} GiB"
        return None

    def _measure(self, engine: str, batch: int | None) -> None:
        label = engine if batch is None else f"{engine}, batch {batch}"
        if engine != "flexrun":
            self._prepare(engine)
        self.cache = drop_page_cache([self.model.directory, self.work], self.given.drop_cache)
        try:
            run = self._run_flexrun if batch is None else self._run_peer
            result = run(engine, batch)
        except CapError:
            raise
        except Exception as error:  # whatever a peer prints, the others go on
            result = Measurement(engine, batch, failure=f"unreadable result: {error!r}")
        self.measurements.append(result)
        say(
            f"{label}: {result.failure}"
            if result.failure
            else f"{label}: {result.tokens_per_second:.2f} tok/s, {result.seconds:.1f} s, read "
            f"{gib(result.read_bytes)} GiB, RSS {gib(result.peak_rss_bytes)} GiB"
        )

    def _capped(self, command: list[str]) -> CappedRun:
        run = run_capped(
            command,
            self.limit,
            method=self.given.cap_method,
            timeout=self.given.timeout,
            environment=self.environment,
            capture=True,
        )
        self.cap_method = run.method
        return run

    def _failure(self, run: CappedRun) -> str | None:
        if run.stopped == "limit":
            return f"killed by the memory cap of {gib(self.limit)} GiB"
        if run.stopped == "timeout":
            return f"stopped after {self.given.timeout:.0f} s"
        if run.exit_code == 0:
            return None
        for _, line in run.stderr[-20:]:
            say(f"    {line}")
        lines = [line.strip() for _, line in run.stderr if line.strip()] or ["no message"]
        told = [line for line in lines if re.search(r"error\b", line, re.IGNORECASE)] or lines
        return f"exit code {run.exit_code}: {told[-1][:160]}"

    def _measurement(self, engine: str, batch: int | None, run: CappedRun) -> Measurement:
        return Measurement(
            engine,
            batch,
            self.peer_dtype,
            self._failure(run),
            peak_rss_bytes=run.peak_rss_bytes,
            peak_anonymous_bytes=run.peak_anonymous_bytes,
            peak_cgroup_bytes=run.peak_cgroup_bytes,
        )

    def _run_flexrun(self, engine: str, batch: int | None) -> Measurement:
        """Generation lasts from the line that says what was loaded to the summary."""
        folder = Path(tempfile.mkdtemp(prefix="flexrun-", dir=self.work))
        source, target = folder / "prompts.jsonl", folder / "results.jsonl"
        lines = [json.dumps({"prompt_token_ids": prompt}) for prompt in self.prompts]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "flexrun", "generate", "--ignore-eos"]
        command += ["--model", str(self.model.directory), "--input", str(source)]
        command += ["--output", str(target), "--max-tokens", str(self.given.new_tokens)]
        extra = shlex.split(self.given.flexrun_args)
        if "--offload-dir" not in extra:
            command += ["--offload-dir", str(self.work)]
        run = self._capped(command + extra)
        result = self._measurement(engine, batch, run)
        if result.failure:
            return result
        arrived, text = run.stdout[-1]
        summary = json.loads(text)
        loaded = next(((t, x) for t, x in run.stderr if x.startswith("model:")), None)
        result.seconds = arrived - loaded[0] if loaded else summary["seconds"]
        named = [name for name in NAMES.values() if loaded and name in loaded[1]]
        result.dtype = named[0] if named else self.model.dtype
        result.load_seconds = summary.get("load_seconds", 0.0)
        result.read_bytes = run.read_bytes - read_before(run, arrived - result.seconds)
        results = [json.loads(line) for line in target.read_text().splitlines()]
        results.sort(key=lambda line: line["index"])
        result.completions = [line["token_ids"] for line in results]
        result.tokens = sum(map(len, result.completions))
        result.decode_rows = result.tokens / max(1, summary["sweeps"])
        return result

    def _spec(self, engine: str, **more: Any) -> list[str]:
        folder = self.work / engine
        folder.mkdir(exist_ok=True)
        spec = {
            "engine": engine,
            "model": str(self.model.directory),
            "dtype": self.peer_dtype,
            "folder": str(folder),
            "resident": self.resident,
            "gguf": str(self.given.gguf),
            "new_tokens": self.given.peer_tokens or self.given.new_tokens,
            "context": max(map(len, self.prompts)) + self.given.new_tokens,
        }
        path = self.work / f"{engine}.json"
        path.write_text(json.dumps(spec | more), encoding="utf-8")
        return [self.given.peer_python, str(Path(__file__).resolve()), WORKER, str(path)]

    def _prepare(self, engine: str) -> None:
        """What an engine writes to disk once, before anything is measured."""
        if engine == "airllm" and engine not in self._ready:
            self._ready.add(engine)
            say("airllm: writing its layer files")
            self._failure(self._capped(self._spec(engine, prepare=True)))

    def _run_peer(self, engine: str, batch: int | None) -> Measurement:
        """Static batches of similar lengths."""
        assert batch is not None
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        groups = [order[first : first + batch] for first in range(0, len(order), batch)]
        batches = [[self.prompts[i] for i in group] for group in groups]
        run = self._capped(self._spec(engine, batches=batches))
        result = self._measurement(engine, batch, run)
        if result.failure:
            return result
        answer = json.loads(run.stdout[-1][1])
        wanted, made = self.given.new_tokens, self.given.peer_tokens or self.given.new_tokens
        scale = (wanted - 1) / (made - 1) if made != wanted else 1.0
        first = [facts["first"] for facts in answer["batches"]]
        rest = [facts["rest"] for facts in answer["batches"]]
        result.seconds = sum(a[0] + scale * b[0] for a, b in zip(first, rest))
        result.read_bytes = round(sum(a[1] + scale * b[1] for a, b in zip(first, rest)))
        result.extrapolated = made != wanted
        result.load_seconds, result.decode_rows = answer["load_seconds"], float(batch)
        completions: dict[int, list[int]] = {}
        for group, facts in zip(groups, answer["batches"]):
            completions |= dict(zip(group, facts["tokens"]))
        result.completions = [completions[i] for i in range(len(self.prompts))]
        if any(len(tokens) != made for tokens in result.completions):
            result.failure = "generated another number of tokens than asked for"
        result.tokens = len(self.prompts) * wanted
        return result

    def best(self, engine: str) -> list[Measurement]:
        """The runs at an engine's best batch size; none if it never succeeded."""
        good: dict[int | None, list[Measurement]] = {}
        for one in self.measurements:
            if one.engine == engine and not one.failure:
                good.setdefault(one.batch, []).append(one)
        return max(good.values(), key=lambda runs: runs[0].tokens_per_second, default=[])


def read_before(run: CappedRun, moment: float) -> int:
    """Bytes that were read from disk before `moment`, between the samples around it."""
    before, after = (0.0, 0), None
    for sample in run.reads:
        if sample[0] > moment:
            after = sample
            break
        before = sample
    if after is None or before[0] == 0.0:
        return before[1]
    part = (moment - before[0]) / (after[0] - before[0])
    return round(before[1] + part * (after[1] - before[1]))


def gib(nbytes: float) -> str:
    """For people."""
    return f"{nbytes / 2**30:.3g}"


# -------------------------------------------------------------------------------- the report


def product_cases(comparison: Comparison, one: Measurement) -> tuple[str, str]:
    """The matrix products of an engine's prompt phase and of its decode steps."""
    mean = statistics.mean(map(len, comparison.prompts))
    rows = max(1, round(one.decode_rows))
    return f"{one.dtype}:{min(MOST_ROWS, round(rows * mean))}", f"{one.dtype}:{rows}"


def measure_rates(comparison: Comparison) -> dict[str, float]:
    """The rate of every matrix product that an engine's bound needs; empty if it fails."""
    engines = ["flexrun", *comparison.given.peers]
    chosen = [runs[0] for engine in engines if (runs := comparison.best(engine))]
    cases = sorted({case for one in chosen for case in product_cases(comparison, one)})
    model = comparison.model
    command = comparison._spec("rates", cases=cases, hidden=model.hidden, ffn=model.ffn)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        say(f"note: the matrix-product rate could not be measured:\n{done.stderr}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def compute_seconds(comparison: Comparison, one: Measurement, rates: dict[str, float]) -> float:
    """The products that cannot be avoided (so no padding), at the rates measured."""
    prefill, decode = (rates.get(case) for case in product_cases(comparison, one))
    if not prefill or not decode:
        return 0.0
    model, new = comparison.model, comparison.given.new_tokens
    rows = sum(map(len, comparison.prompts))
    count = len(comparison.prompts)
    decoding = model.body * count * (new - 1) + model.head * count * new
    return 2.0 * model.body * rows / prefill + 2.0 * decoding / decode


def engine_row(
    comparison: Comparison, engine: str, disk: float, rates: dict[str, float]
) -> dict[str, Any]:
    """An engine's line: medians over the runs at its best batch size, or why there are none."""
    runs = comparison.best(engine)
    if not runs:
        tried = [*comparison.measurements, *comparison.skipped]
        reasons = dict.fromkeys(m.failure for m in tried if m.engine == engine and m.failure)
        return {"engine": engine, "failure": "; ".join(map(str, reasons)) or "not run"}

    def middle(pick: Callable[[Measurement], float]) -> float:
        return statistics.median(map(pick, runs))

    seconds, read = middle(lambda m: m.seconds), middle(lambda m: m.read_bytes)
    bounds = {"disk": read / disk, "compute": compute_seconds(comparison, runs[0], rates)}
    return {
        "engine": engine,
        "failure": None,
        "batch": runs[0].batch,
        "dtype": runs[0].dtype,
        "runs": len(runs),
        "tokens": runs[0].tokens,
        "tokens_per_second": middle(lambda m: m.tokens_per_second),
        "seconds": seconds,
        "load_seconds": middle(lambda m: m.load_seconds),
        "read_bytes": read,
        "peak_rss_bytes": max(m.peak_rss_bytes for m in runs),
        "peak_anonymous_bytes": max(m.peak_anonymous_bytes for m in runs),
        "peak_cgroup_bytes": max(m.peak_cgroup_bytes or 0 for m in runs) or None,
        "extrapolated": runs[0].extrapolated,
        "disk_bound_seconds": bounds["disk"],
        "compute_bound_seconds": bounds["compute"],
        "share_of_bound": max(bounds.values()) / seconds,
        "bound": max(bounds, key=lambda name: bounds[name]),
        "same_as_flexrun": same_share(runs[0], comparison.best("flexrun")),
    }


def same_share(one: Measurement, flexrun: list[Measurement]) -> float | None:
    """How many of the prompts got flexrun's tokens; near-ties of bf16 make some differ."""
    if not flexrun or not one.completions or not flexrun[0].completions:
        return None
    pairs = list(zip(one.completions, flexrun[0].completions))
    return sum(a == b[: len(a)] for a, b in pairs) / len(pairs)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| engine | batch | type | tok/s | seconds | peak RSS GiB | read GiB | x flexrun "
        "| disk bound s | compute bound s | share of bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["failure"]:
            lines.append(f"| {row['engine']} | {row['failure'].replace('|', '/')} |" + " |" * 9)
            continue
        ratio = row["ratio_to_flexrun"]
        cells = [
            row["engine"] + (" (extrapolated)" if row["extrapolated"] else ""),
            "-" if row["batch"] is None else str(row["batch"]),
            row["dtype"],
            f"{row['tokens_per_second']:.2f}",
            f"{row['seconds']:.1f}",
            gib(row["peak_rss_bytes"]),
            gib(row["read_bytes"]),
            "-" if ratio is None else f"{ratio:.3f}",
            f"{row['disk_bound_seconds']:.1f}",
            f"{row['compute_bound_seconds']:.1f}",
            f"{row['share_of_bound']:.0%} ({row['bound']})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(comparison: Comparison, disks: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The text and the object that the comparison ends with."""
    given = comparison.given
    rates = measure_rates(comparison)
    disk = max(one["bytes_per_second"] for one in disks)
    rows = [engine_row(comparison, name, disk, rates) for name in ["flexrun", *given.peers]]
    ours = rows[0].get("tokens_per_second")
    for row in rows:
        row["ratio_to_flexrun"] = (
            row["tokens_per_second"] / ours if ours and not row["failure"] else None
        )
    notes = [
        f"{len(comparison.prompts)} prompts of {given.prompt_tokens[0]}-{given.prompt_tokens[1]} "
        f"tokens, {given.new_tokens} new tokens each, greedy; cap {gib(comparison.limit)} GiB "
        f"({comparison.cap_method}); page cache before each run: {comparison.cache}.",
        f"Disk {disk / 1e9:.2f} GB/s ({disks[0]['method']}); matrix products "
        "in GFLOP/s by type:rows: "
        + ", ".join(f"{case} {rate / 1e9:.0f}" for case, rate in rates.items())
        + ".",
    ]
    if any(row.get("extrapolated") for row in rows):
        notes.append(
            f"EXTRAPOLATED: the peers so marked generated {given.peer_tokens} tokens per prompt; "
            f"their decode time and bytes were scaled to {given.new_tokens}."
        )
    facts = {
        "rows": rows,
        "measurements": [m.facts() for m in [*comparison.measurements, *comparison.skipped]],
        "disk_rates": disks,
        "matmul_flops": rates,
        "page_cache": comparison.cache,
        "memory_cap_bytes": comparison.limit,
        "memory_cap_method": comparison.cap_method,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()},
        "parameters": comparison.model.parameters,
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "kernel": platform.release(),
            "load_average": os.getloadavg(),
        },
    }
    return "\n\n".join([markdown(rows), *notes]), facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def lengths(text: str) -> tuple[int, int]:
    """`128`, or a range `16-256`."""
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high:
        raise ValueError(text)
    return low, high


def numbers(text: str) -> list[int]:
    """`8,16,32`."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def peer_names(text: str) -> list[str]:
    """`accelerate,transformers`."""
    names = [name for name in text.split(",") if name]
    if not set(names) <= PEERS.keys():
        raise argparse.ArgumentTypeError(f"the peers are {', '.join(PEERS)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a safetensors checkpoint")
    add("--memory-cap", required=True, metavar="SIZE", help="of every run, page cache included")
    add("--prompts", type=int, default=64, metavar="N")
    add("--prompt-tokens", type=lengths, default=(128, 128), metavar="N|LOW-HIGH")
    add("--new-tokens", type=int, default=64, metavar="N")
    add("--batch-sizes", type=numbers, default=[8, 16, 32, 64], metavar="N,N,...")
    add("--peers", type=peer_names, default=list(PEERS), metavar="NAME,...", help=", ".join(PEERS))
    add("--repeats", type=int, default=3, metavar="N", help="of each engine's best; the median")
    add("--flexrun-args", default="--weights disk=100", metavar="TEXT", help="default: %(default)s")
    add("--peer-python", default=sys.executable, metavar="PATH", help="interpreter of the peers")
    add("--peer-dtype", choices=sorted(NAMES.values()), help="default: the checkpoint's")
    add("--peer-tokens", type=int, metavar="N", help="peers generate N, the rest is extrapolated")
    add("--resident", metavar="SIZE", help="weights that Accelerate may keep in memory")
    add("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp")
    add("--timeout", type=float, metavar="SECONDS", help="of one run")
    add("--drop-cache", choices=("auto", "system", "files", "never"), default="auto")
    add("--cap-method", choices=METHODS, default="auto")
    add("--work-dir", type=Path, metavar="DIR", help="for temporary files; on a disk, not in RAM")
    add("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Compare, and print table and object; or be the worker of one run."""
    if sys.argv[1:2] == [WORKER]:
        worker(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
        return
    parser = build_parser()
    given = parser.parse_args()
    if min(given.prompts, given.new_tokens, given.repeats) < 1:
        parser.error("--prompts, --new-tokens and --repeats must be at least 1")
    if given.peer_tokens is not None and not 2 <= given.peer_tokens <= given.new_tokens:
        parser.error("--peer-tokens must be from 2 to --new-tokens")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    try:
        if given.work_dir is not None:
            given.work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="compare-", dir=given.work_dir) as work:
            comparison = Comparison(given, Path(work))
            disks = [disk_rate(comparison.model.files)]
            comparison.run_everything()
            disks.append(disk_rate(comparison.model.files))
            text, facts = report(comparison, disks)
    except (CompareError, CapError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(text)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
