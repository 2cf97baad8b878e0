"""Export to the Hugging Face format and import again: nothing changes, transformers agrees, damage is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, ConfigError, LeviathanError
from model import huggingface
from model.config import FeedForward, LayerConfig, ModelConfig, RouterConfig, Score
from model.huggingface import HuggingFaceCheckpoint, compare_logits, export
from model.huggingface.files import INDEX, SINGLE, read_rows
from model.tensor_source import whole
from tests.support import hf_models


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save a Maverick-like checkpoint in several bfloat16 shards."""
    root = tmp_path_factory.mktemp("saved") / "maverick"
    return hf_models.save(hf_models.make("maverick").bfloat16(), root, max_shard_size="40KB")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", hf_models.PEERS)
def test_out_and_in_again_is_identical_and_transformers_agrees(name, tmp_path):
    """In transformers 5, `rope_scaling` overrides `rope_parameters`. Version 4 knows only the older keys."""
    import transformers

    theirs = hf_models.make(name)
    theirs.config.rope_parameters["rope_theta"] = 123456.0  # not the default, so that losing it is noticed
    first = HuggingFaceCheckpoint(hf_models.save(theirs, tmp_path / "first"))
    export(first, tmp_path / "second", shard_bytes=50_000)
    second = HuggingFaceCheckpoint(tmp_path / "second")
    assert second.family.model_type == first.family.model_type
    huggingface.compare_settings(first.config, tmp_path / "first")
    assert huggingface.model_differences(first.config, second.config) == {}
    for key in first.shapes:
        assert torch.equal(whole(first, key), whole(second, key)), key
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert compare_logits(first, tmp_path / "second") <= 5e-5

    expected, found = (transformers.AutoConfig.from_pretrained(tmp_path / one) for one in ("first", "second"))
    assert found.rope_parameters == expected.rope_parameters and found.dtype == expected.dtype == torch.float32
    assert found.rope_parameters["rope_theta"] == 123456.0
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    new = {"rope_parameters": written.pop("rope_parameters"), "dtype": written.pop("dtype")}
    assert written["torch_dtype"] == "float32"
    assert huggingface.read_config(written)[1] == first.config, "what transformers 4 reads"
    del written["rope_theta"], written["rope_scaling"], written["torch_dtype"]
    assert huggingface.read_config({**written, **new})[1] == first.config, "what transformers 5 reads"


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}


def test_the_check_of_logits_notices_a_wrong_export(saved, tmp_path):
    """Control: our code reads a file with swapped gate and up without error; only transformers' logits reveal it."""
    checkpoint = HuggingFaceCheckpoint(saved)
    export(checkpoint, tmp_path / "out")
    content = load_file(tmp_path / "out" / SINGLE)
    for key in content:
        if key.endswith("gate_up_proj"):
            content[key] = torch.cat(content[key].chunk(2, dim=-1)[::-1], dim=-1).contiguous()
    save_file(content, tmp_path / "out" / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_logits(checkpoint, tmp_path / "out")


def test_unfused_experts_and_the_whole_models_prefix_are_read(saved, tmp_path):
    content = {}
    for key, tensor in tensors(saved).items():
        if key.endswith("gate_up_proj"):
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.t().chunk(2)
                stem = key.replace("gate_up_proj", str(expert))
                content |= {f"{stem}.gate_proj.weight": gate.contiguous(), f"{stem}.up_proj.weight": up.contiguous()}
        elif key.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                content[key.replace("down_proj", f"{expert}.down_proj.weight")] = matrix.t().contiguous()
        else:
            content[key] = tensor
    content = {f"language_model.{key}": tensor for key, tensor in content.items()}
    content["vision_model.class_embedding"] = torch.zeros(8)
    text = json.loads((saved / "config.json").read_text())
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    save_file(content, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match="text_only=true"):
        HuggingFaceCheckpoint(tmp_path)
    first, second = HuggingFaceCheckpoint(saved), HuggingFaceCheckpoint(tmp_path, text_only=True)
    assert all(torch.equal(whole(first, key), whole(second, key)) for key in first.shapes)


LLAMA4 = {"model_type": "llama4_text", "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4}
LLAMA4 |= {"intermediate_size": 32, "num_hidden_layers": 8}


def test_older_spellings_of_the_configuration():
    rope = dict(SCALED)
    new = {**LLAMA4, "no_rope_layers": [1, 1, 1, 0] * 2, "rope_parameters": {**rope, "rope_theta": 5e5}}
    old = {**LLAMA4, "no_rope_layers": [], "attn_temperature_tuning": 4, "for_llm_compressor": False}
    rope["type"] = rope.pop("rope_type")
    old |= {"rope_theta": 5e5, "rope_scaling": rope}
    assert huggingface.read_config(new)[1] == huggingface.read_config(old)[1]
    assert huggingface.read_config(new)[1].nope_every == 4


def test_a_model_that_no_family_expresses_is_refused():
    layer = LayerConfig(FeedForward.moe, rope=False, attention_chunk_size=8)
    for odd in ({"router": RouterConfig(score=Score.softmax)}, {"num_layers": 1, "layer_list": [layer]}):
        with pytest.raises(
            ConfigError, match=r"no family expresses .*llama4_text cannot express model\.(router|layer)"
        ):
            huggingface.write_config(ModelConfig(**odd))


def edit_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def edit_config(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def edit_norm(directory: Path, change) -> None:
    path = next(path for path in directory.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    content = load_file(path)
    content["model.norm.weight"] = change(content["model.norm.weight"])
    save_file({key: tensor for key, tensor in content.items() if tensor is not None}, path)


def truncate(directory: Path) -> None:
    path = max(directory.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])


def garble(directory: Path) -> None:
    path = next(directory.glob("*.safetensors"))
    path.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" + path.read_bytes()[24:])


def extra(directory: Path) -> None:
    path = next(directory.glob("*.safetensors"))
    save_file({**load_file(path), "model.layers.0.odd": torch.zeros(2)}, path)
    edit_index(directory, lambda names: names.update({"model.layers.0.odd": path.name}))


def pickled(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


DAMAGE = {
    "missing": (lambda d: edit_norm(d, lambda t: None), "lacks"),
    "extra": (extra, "does not have, such as model.layers.0.odd"),
    "shape": (lambda d: edit_norm(d, lambda t: t[:-1].clone()), "has shape"),
    "dtype": (lambda d: edit_norm(d, lambda t: t.to(torch.int32)), "stored as I32"),
    "truncated": (truncate, "truncated"),
    "garbled": (garble, "unreadable header"),
    "architecture": (lambda d: edit_config(d, model_type="gpt2"), "model_type=gpt2: is not a supported architecture"),
    "contradiction": (lambda d: edit_config(d, intermediate_size=40), "but config.json asks for"),
    "unsupported": (lambda d: edit_config(d, attention_bias=True), "attention_bias=true: is not supported"),
    "no_key": (lambda d: edit_config(d, hidden_size=None), "config.json"),
    "shard": (lambda d: edit_index(d, lambda names: names.update({"x": "model-9.safetensors"})), "which is not there"),
    "outside": (lambda d: edit_index(d, lambda names: names.update({"x": "../a.safetensors"})), "which is not there"),
    "misplaced": (lambda d: edit_index(d, lambda names: names.pop("model.norm.weight")), "does not place there"),
    "index": (lambda d: (d / INDEX).write_text("{"), "is not an index of shards"),
    "pickle": (pickled, "pickle files"),
    "config": (lambda d: (d / "config.json").write_text("["), "is not JSON"),
    "layer_types": (lambda d: edit_config(d, layer_types=["chunked_attention"] * 4), "contradict no_rope_layers"),
    "interval": (lambda d: edit_config(d, no_rope_layers=None, no_rope_layer_interval=0), "has an invalid value"),
    "short_list": (lambda d: edit_config(d, no_rope_layers=[1, 1], layer_types=None), "0 or 1 for each of 4 layers"),
    "list_of_layers": (lambda d: edit_config(d, no_rope_layers=[0, 1, 2, 3]), "0 or 1 for each of 4 layers"),
    "moe_outside": (lambda d: edit_config(d, moe_layers=[1, 3, 4]), "moe_layers: must list layers between 0 and 3"),
    "moe_before": (lambda d: edit_config(d, moe_layers=[-1, 3]), "moe_layers: must list layers between 0 and 3"),
    "moe_fraction": (lambda d: edit_config(d, moe_layers=[1.0, 3]), "moe_layers: must list layers between 0 and 3"),
    "top_k": (lambda d: edit_config(d, num_experts_per_tok=1.7), "num_experts_per_tok=1.7: must be a whole number"),
    "text_number": (lambda d: edit_config(d, hidden_size="64"), "hidden_size=64: must be a whole number"),
    "flag": (lambda d: edit_config(d, num_local_experts=True), "num_local_experts=True: must be a whole number"),
    "no_chunk": (lambda d: edit_config(d, attention_chunk_size=0), "attention_chunk_size=0: must be positive"),
    "theta": (lambda d: edit_config(d, rope_theta=1e6), "rope_theta.*contradicts rope_parameters"),
    "rope": (lambda d: edit_config(d, rope_scaling={**SCALED, "rope_theta": 5e5}), "rope_scaling.*contradicts rope_p"),
    "layers": (lambda d: edit_config(d, num_hidden_layers=10_001), "num_hidden_layers=10001: is more than"),
    "list_index": (lambda d: (d / INDEX).write_text('{"weight_map": []}'), "is not an index of shards"),
    "null_shard": (lambda d: edit_index(d, lambda names: names.update({"x": None})), "is not an index of shards"),
    "no_config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("damage, reason", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_wrong_is_refused_in_one_message(saved, tmp_path, damage, reason):
    damage(shutil.copytree(saved, tmp_path / "copy"))
    with pytest.raises(LeviathanError, match=reason):
        HuggingFaceCheckpoint(tmp_path / "copy")


def test_rows_outside_a_tensor_are_refused(saved):
    """Rows outside the tensor would belong to its neighbour in the file."""
    entry = HuggingFaceCheckpoint(saved).entries["model.layers.0.self_attn.q_proj.weight"]
    assert read_rows(entry, 60, 64).shape == (4, 64)
    for start, stop in ((60, 65), (-1, 2), (3, 2)):
        with pytest.raises(CheckpointError, match=f"rows {start} to {stop} of a tensor that has 64"):
            read_rows(entry, start, stop)


@pytest.mark.parametrize(
    "mixtures, rotated, periods",
    [
        (range(1, 12, 2), [1, 1, 0] * 4, (2, 3)),
        (range(12), [1] * 12, (1, 0)),
        ((), [1] * 11 + [0], (0, 12)),
        ((1, 2, 5), [1] * 10_000, None),
        (range(1, 12, 2), [0, 1, 1] * 4, None),
    ],
)
def test_layers_are_spelled_by_periods_where_they_have_them(mixtures, rotated, periods):
    """Periods must be found without trying every pair, which would take hours for 10,000 layers."""
    layers = {"num_hidden_layers": len(rotated), "moe_layers": [*mixtures], "no_rope_layers": rotated}
    _, model = huggingface.read_config({**LLAMA4, **layers})
    assert (None if model.layer_list else (model.moe_every, model.nope_every)) == periods
    assert [index for index, layer in enumerate(model.blocks) if layer.feed_forward is FeedForward.moe] == [*mixtures]
    assert [int(layer.rope) for layer in model.blocks] == rotated


def test_an_export_replaces_no_directory(saved, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        export(HuggingFaceCheckpoint(saved), tmp_path)


def test_rounding_is_only_on_request(saved, tmp_path):
    checkpoint = HuggingFaceCheckpoint(saved)
    export(checkpoint, tmp_path / "wide", dtype=torch.float32)
    assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32}
    export(HuggingFaceCheckpoint(tmp_path / "wide"), tmp_path / "narrow", dtype=torch.bfloat16)
    again = HuggingFaceCheckpoint(tmp_path / "narrow")
    assert all(torch.equal(whole(checkpoint, key), whole(again, key)) for key in again.shapes)


@pytest.mark.parametrize("kind", ["llama4_text", "mixtral", "qwen3_moe", "olmoe", "llama", "qwen3"])
def test_what_a_configuration_omits_has_transformers_defaults(kind):
    import transformers

    given = {**LLAMA4, "model_type": kind, "num_key_value_heads": 2, "head_dim": 16}
    if kind == "qwen3_moe":
        given |= {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    filled = transformers.AutoConfig.for_model(**given).to_dict()
    assert huggingface.model_differences(*(huggingface.read_config(c)[1] for c in (given, filled))) == {}
