"""Perplexity through the engine: transformers' own, wherever the weights and the KV cache are."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexrun import cli
from flexrun.arguments import engine_config
from flexrun.errors import UsageError
from flexrun.perplexity import Evaluation, evaluate, windows
from offload.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = [random.Random(5).randrange(1, 256) for _ in range(230)]


def reference(directory: Path, tokens: list[int], context: int, stride: int) -> Evaluation:
    """One window after another through transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    result = Evaluation()
    scored = 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens[begin:end]])).logits[0]
        for at in range(scored, end):
            row = logits[at - begin - 1]
            result.nll -= float(torch.log_softmax(row, -1)[tokens[at]])
            result.greedy[at] = int(row.argmax())
            result.scored += 1
        scored = end
        if end == len(tokens):
            return result
    raise AssertionError("the windows do not reach the end")


@pytest.mark.parametrize(
    ("count", "context", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (100, 16, 15), (101, 16, 1)]
)
def test_windows_score_each_token_once(count, context, stride):
    """All but the first token, with as much before them as was asked for."""
    found = list(windows(count, context, stride))
    scored = [at for each in found for at in range(each.first, each.end)]
    assert scored == list(range(1, count))
    for each in found:
        assert each.end - each.begin <= context
        assert each.first - each.begin >= min(each.first, context - stride)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(
    "where", [("device=100", "device=100"), ("disk=100", "device=100"), ("host=50,disk=50", "")]
)
def test_perplexity_is_that_of_transformers(tiny_llama_dir, tmp_path, device, chunk, where):
    """Also in small micro-batches, a few rows at a time, with keys and values on other tiers."""
    weights, kv_cache = where
    values = {
        "model": str(tiny_llama_dir),
        "device": device,
        "dtype": "float32",
        "weights": weights,
        "kv_cache": kv_cache or ("device=50,disk=50" if device == "cpu" else "device=30,host=70"),
        "micro_batch_rows": 16,
        "max_rows": 48,
        "offload_dir": tmp_path,
    }
    tokens = TEXT if chunk != 1 else TEXT[:90]
    found = evaluate(engine_config(values), tokens, 40, 25, chunk)
    expected = reference(tiny_llama_dir, tokens, 40, 25)
    assert found.scored == expected.scored == len(tokens) - 1
    assert found.nll == pytest.approx(expected.nll, rel=1e-4)
    assert found.greedy == expected.greedy


@pytest.mark.parametrize("where", ["cpu disk=100", "emulated host=100", "emulated disk=100"])
def test_windows_share_the_staging_of_pages(tiny_llama_dir, tmp_path, where):
    """More pages than fit into it at a time, for many windows in small chunks or one long one."""
    device, kv_cache = where.split()
    tokens = (TEXT * 12)[:1500]
    for context, chunk in ((400, 32), (1100, None)):
        values = {
            "model": str(tiny_llama_dir),
            "device": device,
            "dtype": "float32",
            "attention": "device",
            "offload_dir": tmp_path,
        }
        here, away = (
            evaluate(engine_config(values | {"kv_cache": each}), tokens, context, 300, chunk)
            for each in ("device=100", kv_cache)
        )
        assert away.nll == pytest.approx(here.nll, rel=1e-6)


def test_few_rows_of_logits_are_enough(tiny_llama_dir):
    """A policy with room for few of them makes chunks shorter."""
    values = {
        "model": str(tiny_llama_dir),
        "device": "cpu",
        "dtype": "float32",
        "max_sequences": 2,
        "speculation": "off",
    }
    found = evaluate(engine_config(values), TEXT[:60], 30, 15)
    expected = reference(tiny_llama_dir, TEXT[:60], 30, 15)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)


def test_the_command_prints_one_object(tiny_llama_dir, tmp_path, capsys):
    """With the numbers, and quantized weights make it another perplexity."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(each % 90 + 32 for each in TEXT))
    flags = ["--model", str(tiny_llama_dir), "--text", str(text), "--context", "40"]
    flags += ["--device", "cpu", "--dtype", "float32", "--offload-dir", str(tmp_path / "offload")]
    results = []
    for more in ([], ["--weight-bits", "4"], ["--text-tokens", "50", "--stride", "10"]):
        assert cli.main(["eval-ppl", *flags, *more]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    plain, quantized, short = results
    expected = reference(tiny_llama_dir, [each % 90 + 32 for each in TEXT], 40, 20)
    assert plain["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert plain["perplexity"] == math.exp(plain["nll"] / plain["tokens"])
    assert quantized["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)
    assert (short["tokens"], short["stride"]) == (49, 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "5000"], "longer than the model's context"),
        (["--context", "1"], "at least two tokens"),
        (["--stride", "512"], "stride must be from 1 to 511"),
        (["--text", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--text-tokens", "1"], "fewer than two tokens"),
        (["--context", "many"], "not a whole number"),
        (["--keep", "("], "not a regular expression"),
        (["--weight-bits", "3"], "invalid choice"),
    ],
)
def test_wrong_usage_is_explained(tiny_llama_dir, tmp_path, capsys, flags, message):
    """The exit code is 2, and the message names what is wrong."""
    text = tmp_path / "text.txt"
    text.write_text("some text")
    given = ["--model", str(tiny_llama_dir), "--text", str(text), "--device", "cpu"]
    assert cli.main(["eval-ppl", *given, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_trace_is_written(tiny_llama_dir, tmp_path, capsys):
    """As by other commands."""
    text, trace = tmp_path / "text.txt", tmp_path / "trace.json"
    text.write_text("some text that is long enough")
    flags = ["--model", str(tiny_llama_dir), "--text", str(text), "--device", "cpu"]
    assert cli.main(["eval-ppl", *flags, "--context", "8", "--trace", str(trace)]) == 0
    assert json.loads(trace.read_text())["traceEvents"]


def test_perplexity_beyond_any_number_is_infinite():
    """A broken model's, say."""
    assert Evaluation(nll=7e5, scored=100).perplexity == math.inf


def test_numbers_that_are_none_are_an_error(tiny_llama_dir, tmp_path):
    """A model whose logits are NaN has no perplexity."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    values = {"model": str(tmp_path), "device": "cpu", "dtype": "float32"}
    with pytest.raises(UsageError, match="not numbers"):
        evaluate(engine_config(values), TEXT[:30], 20, 10)


def test_rows_read_packed_pages(tiny_llama_dir, monkeypatch):
    """Windows are computed a page at a time; the same in chunks as large reads fewer of them."""
    settings = {"model": str(tiny_llama_dir), "device": "cpu", "dtype": "float32", "kv_bits": 4}
    centres, rows = KVCache.centres, []

    def counted(cache: KVCache, layer: int, number: int) -> Any:
        found = centres(cache, layer, number)
        rows.append(0 if found is None else len(found[0]))
        return found

    monkeypatch.setattr(KVCache, "centres", counted)
    read = []
    for chunk in (None, 100):
        rows.clear()
        found = evaluate(engine_config(settings), TEXT, 128, 64, chunk)
        assert found.scored == len(TEXT) - 1
        assert 1 < found.perplexity < 1000
        read.append(sum(rows))
    assert read[0] > read[1] > 0


@pytest.mark.parametrize(("context", "chunk"), [(64, None), (65, 32), (128, 128)])
def test_windows_without_a_packed_page_are_refused(tiny_llama_dir, context, chunk):
    """They would say that packing costs nothing."""
    settings = {"model": str(tiny_llama_dir), "device": "cpu", "kv_bits": 4}
    with pytest.raises(UsageError, match="read no packed KV page") as caught:
        evaluate(engine_config(settings), TEXT, context, context // 2, chunk)
    assert "--context" in str(caught.value.hint)
