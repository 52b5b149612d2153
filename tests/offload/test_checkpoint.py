"""Reading a checkpoint piece by piece gives what `from_pretrained` gives, or a clear error."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from flexrun.twin import random_twin
from flexrun.twin_config import twin_config
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError
from offload.safetensors_file import SINGLE_FILE, find_files, read_header

FAMILIES = (
    "llama",
    "gpt2",  # tied
    "opt",  # tied, with a prefix of two parts
    "gemma2",
    "phi3",
    "gpt_neox",
    "mixtral",  # experts stacked, keys renamed
    "qwen3_moe",
    "deepseek_v3",  # experts in the second layer only, a persistent buffer
    "granitemoe",
    "gpt_oss",
    "llama4_text",
)


def meta_model(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(twin_config(config), dtype=dtype)


def write(directory: Path, model: PreTrainedModel, shard_size: str = "5GB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def load_in_groups(checkpoint: Checkpoint, names: list[str], size: int) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = {}
    for start in range(0, len(names), size):
        group = dict(checkpoint.load(names[start : start + size]))
        assert group.keys() == set(names[start : start + size])
        loaded |= group
    return loaded


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].is_contiguous(), name
        assert torch.equal(got[name], tensor), name


def edit(directory: Path, change: Any) -> None:
    """Rewrite the checkpoint's single file after `change` of its dict of tensors."""
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def llama_config():
    return AutoConfig.for_model("llama")


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory, llama_config) -> Path:
    return write(tmp_path_factory.mktemp("llama"), random_twin(llama_config, seed=1))


@pytest.fixture
def llama_dir(saved_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved_llama, tmp_path / "copy"))


@pytest.fixture
def llama_meta(llama_config) -> PreTrainedModel:
    return meta_model(llama_config)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_names_load_as_transformers_loads_all(family: str, tmp_path: Path):
    """Three names at a time, from many shards, give exactly the tensors of `from_pretrained`."""
    config = AutoConfig.for_model(family)
    write(tmp_path, random_twin(config, seed=1), shard_size="30KB")
    assert len(find_files(tmp_path)) > 1
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    checkpoint = Checkpoint(tmp_path, meta_model(config), torch.float32)
    assert checkpoint.unexpected == ()
    assert_same(load_in_groups(checkpoint, list(expected), 3), expected)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_tensors_are_cast(family: str, stored: torch.dtype, wanted: torch.dtype, tmp_path: Path):
    """Tensors come in the wanted type, rounded as transformers rounds them."""
    config = AutoConfig.for_model(family)
    write(tmp_path, random_twin(config, seed=1).to(stored))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted).state_dict()
    checkpoint = Checkpoint(tmp_path, meta_model(config, wanted), wanted)
    assert_same(load_in_groups(checkpoint, list(expected), 5), expected)


def test_what_the_model_keeps_in_float32_stays_float32(llama_dir: Path, llama_meta):
    """A parameter declared as float32 keeps that type when bfloat16 is asked for."""
    llama_meta.to(torch.bfloat16)
    llama_meta.model.norm.to(torch.float32)
    checkpoint = Checkpoint(llama_dir, llama_meta, torch.bfloat16)
    loaded = dict(checkpoint.load(["model.norm.weight", "lm_head.weight"]))
    assert loaded["model.norm.weight"].dtype == torch.float32
    assert loaded["lm_head.weight"].dtype == torch.bfloat16


def test_keys_of_the_base_model_alone_are_found(tmp_path: Path):
    """A checkpoint saved without the head and without the prefix `transformer.` loads."""
    config = AutoConfig.for_model("gpt2")
    model = random_twin(config, seed=1)
    write(tmp_path, model.transformer)
    checkpoint = Checkpoint(tmp_path, meta_model(config), torch.float32)
    expected = model.state_dict()
    assert_same(load_in_groups(checkpoint, list(expected), 4), expected)


def test_tied_names_are_one_tensor(tmp_path: Path):
    """A tied head that is not stored is read from the embedding, once for both names."""
    config = AutoConfig.for_model("opt")
    model = random_twin(config, seed=1)
    write(tmp_path, model)
    names = ["lm_head.weight", "model.decoder.embed_tokens.weight"]
    checkpoint = Checkpoint(tmp_path, meta_model(config), torch.float32)
    loaded = dict(checkpoint.load(names))
    assert loaded[names[0]].data_ptr() == loaded[names[1]].data_ptr()
    assert torch.equal(loaded[names[0]], model.state_dict()[names[0]])


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_pair_stored_twice_must_be_equal(same: bool, llama_dir: Path):
    """Two copies of a tied matrix are accepted when equal and refused when different."""

    def copy_embedding(tensors: dict[str, torch.Tensor]) -> None:
        copy = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = copy if same else copy + 1

    edit(llama_dir, copy_embedding)
    model = meta_model(AutoConfig.for_model("llama", tie_word_embeddings=True))
    if same:
        Checkpoint(llama_dir, model, torch.float32)
    else:
        with pytest.raises(CheckpointError, match="different values"):
            Checkpoint(llama_dir, model, torch.float32)


def test_results_of_one_conversion_are_read_once(tmp_path: Path, monkeypatch):
    """Of a conversion's sources each is read once, and other tensors not at all."""
    config = AutoConfig.for_model("mixtral")
    write(tmp_path, random_twin(config, seed=1))
    checkpoint = Checkpoint(tmp_path, meta_model(config), torch.float32)
    read: list[str] = []
    header = type(read_header(tmp_path / SINGLE_FILE)[0])
    original = header.read

    def spy(self, *args):
        read.append(self.key)
        return original(self, *args)

    monkeypatch.setattr(header, "read", spy)
    list(checkpoint.load(["model.layers.0.mlp.experts.down_proj"]))
    assert sorted(read) == [
        f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight" for i in range(8)
    ]


def test_many_experts_are_stacked_in_the_order_of_their_numbers(tmp_path: Path):
    """Expert 10 comes after expert 9, not after expert 1."""
    config: Any = twin_config(AutoConfig.for_model("mixtral"))
    config.num_local_experts = 12
    model = AutoModelForCausalLM.from_config(config)
    write(tmp_path, model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    checkpoint = Checkpoint(tmp_path, model, torch.float32)
    assert torch.equal(dict(checkpoint.load([name]))[name], model.state_dict()[name])


def test_key_that_is_right_already_is_not_renamed(llama_dir: Path, llama_meta, monkeypatch):
    """A rule for older checkpoints does not apply to a key that the model has as it is."""
    rules = [WeightRenaming("norm.weight", "old_norm.weight")]
    monkeypatch.setattr("offload.checkpoint.get_model_conversion_mapping", lambda model: rules)
    checkpoint = Checkpoint(llama_dir, llama_meta, torch.float32)
    assert dict(checkpoint.load(["model.norm.weight"])).keys() == {"model.norm.weight"}


def test_keys_without_use_are_reported(llama_dir: Path, llama_meta):
    """Keys that the model has no use for are listed, except those transformers drops too."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.7.extra.weight"] = torch.zeros(2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    edit(llama_dir, add)
    checkpoint = Checkpoint(llama_dir, llama_meta, torch.float32)
    assert checkpoint.unexpected == ("model.layers.7.extra.weight",)


def test_missing_tensor_is_named(llama_dir: Path, llama_meta):
    """A checkpoint that lacks tensors is refused with their number and names."""
    edit(llama_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*model\.layers\.1\.mlp\.up_proj"):
        Checkpoint(llama_dir, llama_meta, torch.float32)


def test_wrong_shape_is_named(llama_dir: Path, llama_meta):
    """A tensor of another shape is refused with both shapes."""
    edit(llama_dir, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight must have the shape \(32,\)"):
        Checkpoint(llama_dir, llama_meta, torch.float32)


def test_missing_expert_is_refused_when_loaded(tmp_path: Path):
    """A stack of experts that lacks one does not load."""
    config = AutoConfig.for_model("mixtral")
    write(tmp_path, random_twin(config, seed=1))
    edit(
        tmp_path, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.7.w2.weight")
    )
    checkpoint = Checkpoint(tmp_path, meta_model(config), torch.float32)
    with pytest.raises(CheckpointError, match="must have the shape"):
        list(checkpoint.load(["model.layers.0.mlp.experts.down_proj"]))


def test_truncated_file_is_refused(llama_dir: Path, llama_meta):
    """A file that ends early is refused before anything is read from it."""
    path = llama_dir / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        Checkpoint(llama_dir, llama_meta, torch.float32)


def test_file_cut_short_during_the_run_is_noticed(llama_dir: Path, llama_meta):
    """A read that hits the end of the file is an error, not a tensor of zeros."""
    checkpoint = Checkpoint(llama_dir, llama_meta, torch.float32)
    path = llama_dir / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-4])
    last = max(read_all(checkpoint), key=lambda tensor: tensor.offset)
    with pytest.raises(CheckpointError, match="truncated: 4 bytes are missing"):
        list(checkpoint.load([last.key]))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        list(checkpoint.load([last.key]))


def read_all(checkpoint: Checkpoint) -> list[Any]:
    return [source for each in checkpoint._conversions.values() for _, source in each.sources]


def test_missing_shard_is_named(tmp_path: Path, llama_config):
    """An index that names a file which is not there is refused with the file's name."""
    write(tmp_path, random_twin(llama_config, seed=1), shard_size="30KB")
    shard = find_files(tmp_path)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of them are missing: {shard.name}"):
        Checkpoint(tmp_path, meta_model(llama_config), torch.float32)


def test_other_formats_are_refused_with_the_way_out(tmp_path: Path, llama_meta):
    """A directory with pickled weights only is refused and told how to convert them."""
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin") as caught:
        Checkpoint(tmp_path, llama_meta, torch.float32)
    assert "save_pretrained" in str(caught.value)


def test_quantized_checkpoint_is_refused(llama_dir: Path, llama_meta):
    """A config with a quantization method is refused with the method's name."""
    llama_meta.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CheckpointError, match="method bitsandbytes"):
        Checkpoint(llama_dir, llama_meta, torch.float32)


def test_tensors_that_are_stored_as_used_can_be_read_in_place(llama_dir: Path, llama_meta):
    """The bytes at the given places are the model's tensors, tied names' too."""
    expected = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).state_dict()
    places = Checkpoint(llama_dir, llama_meta, torch.float32).in_place(list(expected))
    assert places is not None
    assert places.keys() == expected.keys()
    for name, stored in places.items():
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            data = bytearray(file.read(stored.nbytes))
        read = torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)
        assert torch.equal(read, expected[name]), name


def test_tied_names_are_in_one_place(tmp_path: Path):
    """A tied head that is not stored is read where the embedding lies."""
    config = AutoConfig.for_model("opt")
    write(tmp_path, random_twin(config, seed=1))
    names = ["lm_head.weight", "model.decoder.embed_tokens.weight"]
    places = Checkpoint(tmp_path, meta_model(config), torch.float32).in_place(names)
    assert places is not None
    assert places[names[0]] == places[names[1]]


def test_another_type_or_a_conversion_cannot_be_read_in_place(llama_dir: Path, tmp_path: Path):
    """A cast, or one converted tensor among the names, rules reading in place out."""
    model = meta_model(AutoConfig.for_model("llama"), torch.bfloat16)
    assert Checkpoint(llama_dir, model, torch.bfloat16).in_place(["model.norm.weight"]) is None
    config = AutoConfig.for_model("mixtral")
    write(tmp_path, random_twin(config, seed=1))
    checkpoint = Checkpoint(tmp_path, meta_model(config), torch.float32)
    experts = "model.layers.0.mlp.experts.down_proj"
    assert checkpoint.in_place(["model.norm.weight"]) is not None
    assert checkpoint.in_place(["model.norm.weight", experts]) is None


def test_a_tensor_at_an_odd_offset_cannot_be_read_in_place(llama_dir: Path, llama_meta):
    """A file whose header shifts the tensors off their type's boundary is not used in place."""
    path = llama_dir / SINGLE_FILE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    shifted = (size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :]
    path.write_bytes(shifted)
    checkpoint = Checkpoint(llama_dir, llama_meta, torch.float32)
    assert checkpoint.in_place(["model.norm.weight"]) is None
    assert dict(checkpoint.load(["model.norm.weight"])).keys() == {"model.norm.weight"}


def test_the_fingerprint_changes_with_the_files(llama_dir: Path, llama_meta):
    """Equal files give equal fingerprints; a new time stamp alone gives another one."""
    checkpoint = Checkpoint(llama_dir, llama_meta, torch.float32)
    same = Checkpoint(llama_dir, llama_meta, torch.float32)
    assert checkpoint.fingerprint() == same.fingerprint()
    checkpoint.check_unchanged()
    os.utime(llama_dir / SINGLE_FILE, ns=(0, 1))
    changed = Checkpoint(llama_dir, llama_meta, torch.float32)
    assert checkpoint.fingerprint() != changed.fingerprint()
    with pytest.raises(CheckpointError, match="was changed while it was being read"):
        checkpoint.check_unchanged()


def test_the_fingerprint_of_converted_tensors_is_of_a_version(tmp_path: Path, monkeypatch):
    """Where transformers converts tensors, another version of it counts as another source."""
    for family in ("mixtral", "llama"):
        config = AutoConfig.for_model(family)
        write(tmp_path / family, random_twin(config, seed=1))
        checkpoint = Checkpoint(tmp_path / family, meta_model(config), torch.float32)
        before = checkpoint.fingerprint()
        with monkeypatch.context() as patch:
            patch.setattr("offload.checkpoint.transformers.__version__", "other")
            assert (checkpoint.fingerprint() == before) == (family == "llama")
