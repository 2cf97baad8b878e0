"""Compare the model with vision with transformers in float32. Controls plant each mistake once.

Shapes: B batch, T sequence, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.vision.encoder as encoder_file
from core.errors import ConfigError, DataError
from model import huggingface
from model.attention.plan import ForwardContext
from model.tensor_source import whole
from model.vision.config import VisionConfig
from model.vision.encoder import BiasedLinear, LayerNorm, VisionEncoder
from model.vision.fusion import images_of, no_images
from tests.support import hf_models

PATCH = 90
CASES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "no_image": ({}, [[], []]),
    "one_image": ({}, [[4], [9]]),
    "three_and_none": ({}, [[1, 10, 19], []]),
    "tiles_in_a_row": ({}, [[2, 6, 10], [3, 14, 18]]),  # tiles of one picture follow each other
    "odd_heads": ({"heads": 3}, [[4], [5, 16]]),
    "large_grid": ({"tile": 48, "patch": 8}, [[3], [8]]),
    "dense_decoder": ({"moe_layers": [], "num_hidden_layers": 2}, [[2], []]),
    "without_qk_norm": ({"use_qk_norm": False, "interleave_moe_layer_step": 2}, [[7], [1, 12]]),
}


def batch(places: list[list[int]], theirs: Any) -> tuple[Tensor, Tensor]:
    """Return tokens [B, T] with a tile's placeholders at each of `places`, and the pixels of the tiles."""
    vision = theirs.config.vision_config
    per_tile = (vision.image_size // vision.patch_size) ** 2 // 4
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(
        1, PATCH, (len(places), 37), generator=generator
    )  # 0 is padding: transformers gives it no gradient
    for row, starts in enumerate(places):
        for start in starts:
            tokens[row, start : start + per_tile] = PATCH
    count = sum(map(len, places))
    return tokens, torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator)


def their_logits(theirs: Any, tokens_BT: Tensor, pixels_N3SS: Tensor) -> Tensor:
    pixels = {"pixel_values": pixels_N3SS} if len(pixels_N3SS) else {}
    return theirs(input_ids=tokens_BT, use_cache=False, **pixels).logits


def loss_of(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient(case, tmp_path):
    changes, places = CASES[case]
    theirs = hf_models.make_with_vision(**changes)
    ours = huggingface.load(hf_models.save(theirs, tmp_path / "weights"))
    tokens, pixels = batch(places, theirs)
    expected, logits = their_logits(theirs, tokens, pixels), ours(tokens, pixels=pixels)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    losses = [loss_of(one, tokens) for one in (logits, expected)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    gradients = huggingface.HuggingFaceCheckpoint(hf_models.save(theirs, tmp_path / "gradients"))
    for key, parameter in ours.named_parameters():
        wanted = whole(gradients, key)
        assert (parameter.grad - wanted).abs().max() <= 1e-4 * max(float(wanted.abs().max()), 1e-6), key
        assert wanted.abs().max() > 0 or (key.startswith("vision.") and not len(pixels)), key


def class_token_first(honest, self, tiles_N3SS):
    """Encode with the class token before the patches, in their positions too."""
    cat, pad = torch.cat, F.pad
    try:
        torch.cat = lambda parts, dim=0: cat(
            parts[::-1] if dim == 1 and len(parts) == 2 and parts[1].shape[1] == 1 else parts, dim
        )
        return honest(self, tiles_N3SS)
    finally:
        torch.cat, F.pad = cat, pad


def transposed_patches(tiles_N3SS, size):
    """Order the values of a patch by row, column and channel."""
    found = encoder_file_patches(tiles_N3SS, size)
    return found.unflatten(-1, (3, size * size)).transpose(-1, -2).flatten(-2)


def swapped_axes(config, device, dtype):
    found = honest_rotation(config, device, dtype)
    return torch.cat(found.chunk(2, dim=-1)[::-1], dim=-1)


def from_zero(config, device, dtype):
    found = honest_rotation(config, device, dtype)
    one = found[:, :1]  # the first patch has row 1 and column 1
    return torch.cat([found[:, :-1] * one.conj(), found[:, -1:]], dim=1)


encoder_file_patches, honest_rotation = encoder_file.patches, encoder_file.tile_rotation
attention, gelu, norm = F.scaled_dot_product_attention, F.gelu, F.layer_norm
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "patch_order": (encoder_file, "patches", transposed_patches),
    "rotary_from_0": (encoder_file, "tile_rotation", from_zero),
    "no_rotary": (encoder_file, "rotate", lambda x, rotation: x),
    "axes_swapped": (encoder_file, "tile_rotation", swapped_axes),
    "causal": (
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **rest: attention(q, k, v, **(rest or {"is_causal": True})),
    ),
    "no_biases": (BiasedLinear, "forward", lambda self, x: super(BiasedLinear, self).forward(x)),
    "shuffle_order": (
        encoder_file,
        "pixel_shuffle",
        lambda x, side: x.reshape(len(x), side * side // 4, 4 * x.shape[-1]),
    ),
    "one_gelu": (F, "gelu", lambda x: x if x.shape[-1] == 40 and x.requires_grad else gelu(x)),
    "gelu_by_tanh": (F, "gelu", lambda x: gelu(x, approximate="tanh")),
    "other_eps": (F, "layer_norm", lambda x, shape, weight, bias, eps: norm(x, shape, weight, bias, 1e-6)),
    "no_first_norm": (
        LayerNorm,
        "forward",
        lambda self, x: x if self is FIRST[0] else norm(x, x.shape[-1:], self.weight, self.bias, self.eps),
    ),
    "class_token_first": (VisionEncoder, "forward", None),
}
FIRST: list[Any] = [None]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_notices_each_mistake(mistake, tmp_path, monkeypatch):
    theirs = hf_models.make_with_vision()
    ours = huggingface.load(hf_models.save(theirs, tmp_path))
    tokens, pixels = batch([[4], [9, 20]], theirs)
    expected = their_logits(theirs, tokens, pixels)
    assert (ours(tokens, pixels=pixels) - expected).abs().max() <= 5e-5
    FIRST[0] = ours.vision.first_norm
    if mistake == "other_eps":  # an epsilon is seen where the variance is small
        with torch.no_grad():
            for one in (
                theirs.vision_model if hasattr(theirs, "vision_model") else theirs.model.vision_model,
                ours.vision,
            ):
                for name, parameter in one.named_parameters():
                    if "patch" in name or "position" in name or "class" in name:
                        parameter.mul_(0.02)
        expected = their_logits(theirs, tokens, pixels)
        assert (ours(tokens, pixels=pixels) - expected).abs().max() <= 5e-5
    owner, attribute, wrong = MISTAKES[mistake]
    if mistake == "class_token_first":
        honest = VisionEncoder.forward
        wrong = lambda self, tiles: class_token_first(honest, self, tiles)  # noqa: E731
    monkeypatch.setattr(owner, attribute, wrong)
    assert (ours(tokens, pixels=pixels) - expected).abs().max() > 5e-5


def test_packed_documents_equal_separate_runs(tmp_path):
    theirs = hf_models.make_with_vision()
    ours = huggingface.load(hf_models.save(theirs, tmp_path))
    tokens, pixels = batch([[3, 16, 22]], theirs)
    lengths = (12, 18, 7)  # an image in the first, two in the second, none in the third
    context = ForwardContext(torch.cat([torch.arange(length) for length in lengths])[None])
    packed = ours(tokens, context, pixels)[0]
    for document, own, found in zip(
        tokens[0].split(lengths), pixels.split((1, 2, 0)), packed.split(lengths), strict=True
    ):
        torch.testing.assert_close(found, their_logits(theirs, document[None], own)[0], rtol=0, atol=5e-5)


def test_import_and_export_are_equal_to_the_byte(tmp_path):
    theirs = hf_models.make_with_vision()
    source = huggingface.HuggingFaceCheckpoint(hf_models.save(theirs, tmp_path / "theirs"))
    huggingface.export(
        source, tmp_path / "ours", verify=lambda there: huggingface.compare_settings(source.config, there)
    )
    assert huggingface.compare_logits(source, tmp_path / "ours") <= 5e-5
    back = huggingface.HuggingFaceCheckpoint(tmp_path / "ours")
    assert back.config == source.config and back.family.model_type == "llama4"
    assert {entry for entry in back.entries} == {name for name in source.entries}
    for name in source.shapes:
        assert torch.equal(whole(source, name), whole(back, name)), name
    assert (tmp_path / "ours" / "preprocessor_config.json").exists()


def test_the_check_notices_an_encoder_that_is_not_loaded(tmp_path):
    source = huggingface.HuggingFaceCheckpoint(hf_models.save(hf_models.make_with_vision(), tmp_path / "theirs"))
    huggingface.export(source, tmp_path / "ours")
    honest = source.read
    source.read = lambda name, offset, shape: honest(name, offset, shape) * (0.5 if name == "vision.class_token" else 1)
    with pytest.raises(Exception, match="logits differ from transformers'"):
        huggingface.compare_logits(source, tmp_path / "ours")


def test_text_only_drops_the_encoder(tmp_path):
    hf_models.save(hf_models.make_with_vision(), tmp_path)
    ours = huggingface.load(tmp_path, text_only=True)
    assert ours.config.vision is None and ours.vision is None


def test_quantised_files_are_refused_in_both_readings():
    config = {**hf_models.make_with_vision().config.to_dict(), "quantization_config": {"quant_method": "fp8"}}
    for text_only in (False, True):
        with pytest.raises(ConfigError, match=r"quantization_config\.weight_block_size.*: is not supported"):
            huggingface.read_config(config, text_only)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_eps", 1e-6), ("hidden_act", "gelu_pytorch_tanh"), ("pixel_shuffle_ratio", 0.25), ("vision_output_dim", 41)],
)
def test_settings_that_transformers_ignores_are_refused(key, value, tmp_path):
    config = hf_models.make_with_vision().config.to_dict()
    config["vision_config"][key] = value
    with pytest.raises(ConfigError, match=rf"vision_config\.{key}={value}: is not supported"):
        huggingface.read_config(config)


def test_tiles_and_placeholders_must_agree(tmp_path):
    theirs = hf_models.make_with_vision()
    ours = huggingface.load(hf_models.save(theirs, tmp_path))
    tokens, pixels = batch([[3], []], theirs)
    for wrong, reason in (
        (pixels[:0], "there are 0 tiles"),
        (pixels.repeat(2, 1, 1, 1), "2 tiles of 4 tokens = 8"),
        (pixels[..., :14], r"needs \[N, 3, 28, 28\]"),
    ):
        with pytest.raises(DataError, match=reason):
            ours(tokens, pixels=wrong)


def test_an_empty_batch_gives_gradients_of_zero(tmp_path):
    ours = huggingface.load(hf_models.save(hf_models.make_with_vision(), tmp_path))
    tokens, _ = batch([[], []], hf_models.make_with_vision())
    loss_of(ours(tokens), tokens).backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.vision.parameters())
    assert no_images(ours.config.vision, ours.embedding(tokens)).rows_BT.eq(-1).all()
    assert images_of(ours.config.vision, tokens, torch.zeros(0, 3, 28, 28)).rows_BT.eq(-1).all()


def test_wrappers_cannot_cast_the_rotation():
    """FSDP2 and ZeRO-3 cast floating-point arguments of a layer to bfloat16, but not complex ones."""
    assert honest_rotation(VisionConfig(), torch.device("cpu"), torch.bfloat16).dtype is torch.complex64
