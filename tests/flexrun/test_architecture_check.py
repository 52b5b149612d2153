"""What cannot be run exactly is found out and refused, with the reason, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.gptj import modeling_gptj

from flexrun import LLM, UnsupportedModelError, architecture_check, cli, twin, twin_run
from flexrun.architecture_check import Verdict, cached_verdict, check_architecture
from flexrun.attention.torch_ops import TorchAttention
from flexrun.model import Model, build_model
from flexrun.paused_forward import PausedForward, flexrun_attention
from offload import checkpoint
from offload.safetensors_file import StoredTensor
from tests.families import config_of

INTERFACE = "does not go through transformers' attention interface"
STATE = "keeps recurrent or convolution state"
MUSICGEN_PARTS = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"model_type": "musicgen_decoder"},
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("falcon", {}, INTERFACE),
    "falcon with ALiBi": ("falcon", {"alibi": True}, "uses ALiBi position biases"),
    "bloom": ("bloom", {}, "uses ALiBi position biases"),
    "mpt": ("mpt", {}, "uses ALiBi position biases"),
    "gpt_neo": ("gpt_neo", {}, INTERFACE),
    "openai-gpt": ("openai-gpt", {}, "layers [0, 1, 2, 3] do not go through"),
    "mamba": ("mamba", {}, STATE),
    "jamba": ("jamba", {}, STATE),
    "qwen3_next": ("qwen3_next", {}, STATE),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 16}, "layers of kind conv"),
    "gemma3n": ("gemma3n", {}, "share another layer's KV cache"),
    "gemma3n_text": ("gemma3n_text", {}, "share another layer's KV cache"),
    "diffllama": ("diffllama", {}, "a layer attends more than once"),
    "doge": ("doge", {}, "makes attention masks of its own"),
    "bert": ("bert", {}, "its tokens attend to later ones as well"),
    "jetmoe": ("jetmoe", {}, "cannot be followed without weights"),
    "t5": ("t5", {}, "an encoder-decoder"),
    "musicgen": ("musicgen", MUSICGEN_PARTS, "an encoder-decoder"),
    "mistral3": ("mistral3", {}, "no causal language model for this architecture"),
}


class Broken(TorchAttention):
    """Attention that leaves out one of the options."""

    def __init__(self, **dropped: None) -> None:
        self.dropped = dropped

    def parts(self, query, key, value, groups, options, centres=None):
        state = super().parts(query, key, value, groups, replace(options, **self.dropped))
        if "sinks" in self.dropped:
            finish = state.finish
            vars(state)["finish"] = lambda _, dtype: finish(None, dtype)
        return state


@pytest.fixture
def checkpoint_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes checkpoints of a config and of weights that must not be touched."""

    def fail(*_: object) -> None:
        raise AssertionError("a weight file was read")

    monkeypatch.setattr(StoredTensor, "read", fail)
    monkeypatch.setattr(checkpoint, "find_files", fail)
    monkeypatch.setattr(checkpoint, "read_header", fail)
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))

    def make(config: PretrainedConfig) -> Path:
        directory = tmp_path / "model"
        config.save_pretrained(directory)
        (directory / "model.safetensors").write_bytes(b"not to be read")
        return directory

    return make


@pytest.fixture
def twin_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the twins that were compared, with a cache of its own."""
    runs: list[str] = []

    def compare(model):
        runs.append(model.config.model_type)
        return twin_run.compare_with_twin(model)

    monkeypatch.setattr(architecture_check, "compare_with_twin", compare)
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path / "cache"))
    return runs


def test_a_family_that_moves_to_the_interface_is_exact():
    """GPT-J goes through the attention interface from some version of transformers on."""
    verdict = check_architecture(config_of("gptj"))
    if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
        assert verdict.status == "exact"
    else:
        assert verdict.status == "refused"
        assert INTERFACE in verdict.detail


@pytest.mark.parametrize("case", REFUSED)
def test_architecture_is_refused_with_the_reason(case: str, checkpoint_dir):
    """The verdict and the engine's error name the property, and no weight file was opened."""
    family, settings, reason = REFUSED[case]
    config = config_of(family, **settings)
    verdict = check_architecture(config)
    assert verdict.status == "refused"
    assert reason in verdict.detail
    assert verdict.detail.count("cannot be run exactly") == 1
    assert "\n" not in verdict.detail
    with pytest.raises(UnsupportedModelError) as caught:
        LLM(checkpoint_dir(config), device="cpu")
    assert caught.value.message == verdict.detail


@pytest.mark.parametrize("family", ["llama4_text", "llama4"])
def test_difference_that_only_a_run_shows_is_found(family: str, checkpoint_dir):
    """Llama 4 scales queries by row numbers, not by positions: wrong where sequences are packed."""
    verdict = check_architecture(config_of(family))
    assert verdict.status == "not exact"
    assert "it depends on earlier sweeps (state, or positions)" in verdict.detail
    with pytest.raises(UnsupportedModelError, match="cannot be run exactly: logits differ"):
        LLM(checkpoint_dir(config_of(family)), device="cpu")


def test_language_part_of_a_composite_model_is_checked():
    """Of a model that also sees, the language model is what counts."""
    assert check_architecture(AutoConfig.for_model("gemma3")).status == "exact"


@pytest.mark.parametrize(
    ("family", "settings", "dropped", "layer"),
    [
        ("mistral", {}, "sliding_window", 0),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 16}, "sliding_window", 1),
        ("gemma2", {}, "softcap", 0),
        ("gpt_oss", {}, "sinks", 0),
    ],
)
def test_broken_attention_is_located(family: str, settings, dropped: str, layer: int, monkeypatch):
    """The verdict says in which layer the outputs begin to differ."""
    monkeypatch.setattr(twin_run, "TorchAttention", lambda: Broken(**{dropped: None}))
    verdict = check_architecture(config_of(family, **settings))
    assert verdict.status == "not exact"
    assert f"from layer {layer} on, already in one prompt" in verdict.detail


def test_row_numbers_for_positions_are_found(monkeypatch):
    """Rows counted through the batch look right within one prompt, and are caught nevertheless."""
    forward = Model.forward

    def wrong(self, attend, input_ids, positions, logit_rows):
        return forward(self, attend, input_ids, torch.arange(len(positions)), logit_rows)

    monkeypatch.setattr(Model, "forward", wrong)
    verdict = check_architecture(config_of("llama"))
    assert verdict.status == "not exact"
    assert "not within one prompt" in verdict.detail


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": torch.zeros(1)}, "makes attention masks of its own"),
        ({"is_causal": False}, "attend to later ones"),
        ({"block_indices": torch.zeros(1)}, "its attention also takes block_indices"),
    ],
)
def test_unknown_demands_on_attention_are_refused(options: dict[str, Any], reason: str):
    """Masks, and tensors whose meaning is not known, are not dropped in silence."""
    heads = torch.zeros(1, 2, 3, 4)
    run = PausedForward(
        lambda: flexrun_attention(torch.nn.Identity(), heads, heads, heads, **options),
        {},
        lambda module, q, k, v, _: v.transpose(0, 1),
    )
    with pytest.raises(UnsupportedModelError, match=reason):
        run.resume()


def test_twin_that_is_not_small_is_refused(monkeypatch):
    """A config whose sizes are not understood costs no memory."""
    monkeypatch.setattr(twin, "_MOST_WEIGHTS", 10)
    verdict = check_architecture(config_of("llama"))
    assert verdict.status == "refused"
    assert "more than 10" in verdict.detail


def test_longrope_model_has_the_context_of_its_short_factors():
    """Beyond it transformers changes the frequencies of the whole batch."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 96,
    }
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 96}
    config = config_of("phi3", rope_parameters=rope, **sizes, **lengths)
    assert build_model(config, torch.float32, torch.device("cpu")).context_length == 96


def test_verdict_is_kept(twin_runs):
    """The second look at an architecture, in whatever size, runs no twin."""
    first = cached_verdict(config_of("llama"))
    assert first.status == "exact"
    assert cached_verdict(config_of("llama", num_hidden_layers=80)) == first
    assert twin_runs == ["llama"]
    assert cached_verdict(config_of("llama", attention_bias=True)).status == "exact"
    assert len(twin_runs) == 2


def test_verdict_is_of_one_version_of_transformers(twin_runs, monkeypatch):
    """After an update of transformers the twin runs again."""
    cached_verdict(config_of("llama"))
    monkeypatch.setattr("flexrun.architecture_check.transformers.__version__", "99.0")
    cached_verdict(config_of("llama"))
    assert len(twin_runs) == 2


def test_damaged_verdict_is_replaced(twin_runs, tmp_path):
    """A verdict file that cannot be read counts for nothing."""
    cached_verdict(config_of("llama"))
    (file,) = (tmp_path / "cache").rglob("llama-*.json")
    file.write_text('{"status": "exa')
    assert cached_verdict(config_of("llama")).status == "exact"
    assert json.loads(file.read_text())["status"] == "exact"
    assert len(twin_runs) == 2


def test_refusal_is_not_kept(twin_runs, monkeypatch):
    """A twin that failed for want of memory gets another chance."""
    with monkeypatch.context() as patch:
        patch.setattr(twin, "_MOST_WEIGHTS", 10)
        assert cached_verdict(config_of("llama")).status == "refused"
    assert cached_verdict(config_of("llama")).status == "exact"


def run_check(model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["check", "--model", str(model)])
    return (code, *capsys.readouterr())


def test_check_command_says_exact(checkpoint_dir, capsys):
    """Exit code 0, the verdict on standard output, and no weight is read."""
    model = checkpoint_dir(config_of("llama"))
    code, out, _ = run_check(model, capsys)
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith(f"{model}: exact: ")


@pytest.mark.parametrize(("family", "status"), [("falcon", "refused"), ("llama4", "not exact")])
def test_check_command_says_why_not(family: str, status: str, checkpoint_dir, capsys):
    """Exit code 1 and the reason."""
    model = checkpoint_dir(config_of(family))
    code, out, _ = run_check(model, capsys)
    assert code == 1
    assert out.startswith(f"{model}: {status}: ")


@pytest.mark.parametrize("config", ["{}", "[", '{"model_type": "llama", "hidden_size": "many"}'])
def test_check_command_without_a_usable_config(config: str, tmp_path, capsys):
    """Exit code 2 and one error in words, nothing on standard output."""
    (tmp_path / "config.json").write_text(config)
    code, out, err = run_check(tmp_path, capsys)
    assert (code, out) == (2, "")
    assert "flexrun: error: cannot read the model config" in err


def test_verdict_reads_well():
    """A verdict is its status and its detail."""
    assert str(Verdict("refused", "llama models are odd")) == "refused: llama models are odd"
