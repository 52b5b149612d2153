"""Facts about the library's front door, on an engine without a model."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import flexrun
from flexrun import LLM, RequestError, SamplingParams, UsageError
from flexrun.tokenizer import Tokenizer
from tests.flexrun.fake_engine import CONTEXT, FakeEngine
from tests.tiny_models import byte_tokenizer

SHORT = SamplingParams(max_tokens=2)


@pytest.fixture
def engines(monkeypatch) -> list[FakeEngine]:
    """Every engine that is made, so that tests can look inside."""
    made: list[FakeEngine] = []

    def make(config, tokenizer):
        made.append(FakeEngine())
        made[-1].config = config  # type: ignore[attr-defined]
        return made[-1]

    module = types.ModuleType("flexrun.engine")
    module.Engine = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexrun.engine", module)
    monkeypatch.setattr(Tokenizer, "load", lambda directory: Tokenizer(byte_tokenizer()))
    return made


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def llm(engines, model):
    with LLM(model) as llm:
        yield llm


def test_results_are_in_the_order_of_the_prompts(llm):
    """Texts and token ids may be mixed, each with its own parameters."""
    prompts = ["ab", {"prompt": "cd"}, {"prompt_token_ids": [5, 6]}]
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 4)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [(97, 98), (99, 100), (5, 6)]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 4]
    assert [output.prompt for output in outputs] == ["ab", "cd", None]


def test_one_prompt_gives_one_result(llm):
    """A single prompt needs no list; no prompts give no results."""
    assert len(llm.generate("ab", SHORT)) == 1
    assert len(llm.generate({"prompt_token_ids": [1]}, SHORT)) == 1
    assert llm.generate([], SHORT) == []


def test_chat_takes_one_conversation_or_many(llm):
    """Conversations go through the chat template."""
    conversation = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(conversation, SHORT)
    assert bytes(one.prompt_token_ids) == b"user: hi\nassistant: "
    assert len(llm.chat([conversation, conversation], SHORT)) == 2


@pytest.mark.parametrize("bad", ["", {"prompt_token_ids": []}, "x" * CONTEXT])
def test_a_request_that_cannot_be_served_stops_all_of_them(llm, engines, bad):
    """The error names the prompt, and nothing was started."""
    with pytest.raises(RequestError, match="prompt 1"):
        llm.generate(["ab", bad], SHORT)
    assert not engines[0].has_unfinished
    assert len(llm.generate("ab", SHORT)) == 1


@pytest.mark.parametrize("bad", [5, None, {"text": "a"}, [1, 2], {"prompt": 3}])
def test_prompts_of_other_types_are_refused(llm, bad):
    """What is not a prompt is a usage error that shows what is."""
    with pytest.raises(UsageError, match="prompt_token_ids"):
        llm.generate([bad], SHORT)


def test_parameters_must_match_the_prompts(llm):
    """Parameters are one, or one for each prompt."""
    with pytest.raises(UsageError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [SHORT])


def test_a_closed_llm_says_so(llm, engines):
    """Closing twice is fine; using it afterwards is a clear error."""
    llm.close()
    llm.close()
    assert engines[0].closed
    with pytest.raises(UsageError, match="it was closed"):
        llm.generate("ab")
    with pytest.raises(UsageError, match="it was closed"):
        llm.summary()


def test_an_interrupted_llm_closes_itself(llm, engines):
    """After Ctrl-C within a sweep the engine's state is of no use, and the next call says so."""
    engines[0].break_at_sweep, engines[0].error = 1, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.generate("ab", SHORT)
    assert engines[0].closed
    with pytest.raises(UsageError, match="interrupted"):
        llm.generate("ab", SHORT)


def test_settings_may_be_texts(engines, model):
    """Splits and sizes are accepted as on the command line; unknown settings are refused."""
    LLM(str(model), weights="device=25,host=75", device_memory="2GiB", seed=4, kv_bits=4).close()
    config = engines[0].config
    assert (config.kv_bits, config.quantization.kv_bits) == (4, 4)
    assert (config.weights.host, config.device_memory, config.seed) == (75, 2**31, 4)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weight": "device=100"}, "unknown setting 'weight'"),
        ({"device": "tpu"}, "device must be one of"),
        ({"max_rows": "many"}, "max_rows must be a whole number"),
        ({"kv_cache": "device=1"}, "kv_cache: split"),
        ({"kv_bits": 8}, "kv_bits must be one of 16, 4, not 8"),
        ({"kv_bits": "4"}, "kv_bits must be one of 16, 4, not '4'"),
    ]
    for settings, words in wrong:
        with pytest.raises(UsageError, match=words):
            LLM(model, **settings)


def test_a_model_without_tokenizer_takes_token_ids(engines, model, monkeypatch):
    """Without a tokenizer only texts are refused."""

    def none(directory):
        raise UsageError("cannot load a tokenizer")

    monkeypatch.setattr(Tokenizer, "load", none)
    with LLM(model) as llm:
        assert len(llm.generate({"prompt_token_ids": [1]}, SHORT)) == 1
        with pytest.raises(RequestError, match="tokenizer"):
            llm.generate("ab", SHORT)
        with pytest.raises(UsageError, match="tokenizer"):
            llm.get_tokenizer()


def test_the_tokenizer_is_the_models_own(llm):
    """`get_tokenizer` gives the transformers tokenizer."""
    assert llm.get_tokenizer().decode([104, 105]) == "hi"


def test_package_exports_what_it_names():
    """Each name of `__all__` is there, others are not, and importing needs no torch."""
    assert all(hasattr(flexrun, name) for name in flexrun.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = flexrun.Nothing
    code = "import sys, flexrun; flexrun.SamplingParams(); sys.exit('torch' in sys.modules)"
    root = Path(flexrun.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
