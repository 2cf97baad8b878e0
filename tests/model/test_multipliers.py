"""Fold constant factors of the forward pass into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from core.errors import CheckpointError, ConfigError
from model.config import ModelConfig, MultipliersConfig, QKNorm
from model.huggingface import compare_logits, export, write_config
from model.multipliers import fold_multipliers
from model.tensor_source import materialise
from precision.config import Compute
from tests.support.models import build, small

FACTORS = MultipliersConfig(residual=0.3, logits=0.6, attention=1.7, gates=0.45)
MODEL = small(vocab_size=96, expert_hidden_size=40, nope_every=0, attention_chunk_size=None, qk_norm=QKNorm.none)
IDS = torch.arange(40).view(2, 20) * 7 % 96


class Weights:
    """A tensor source with the weights of a new model."""

    def __init__(self, config: ModelConfig) -> None:
        model = build(replace(config, init=replace(config.init, std=1.0, fan_in=True)), compute=Compute.float32)
        self.config, self.tensors = config, {name: p.detach() for name, p in model.named_parameters()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self.tensors[name][tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]


def logits(source) -> Tensor:
    with torch.no_grad():
        return materialise(source)(IDS)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("norm", [QKNorm.none, QKNorm.per_head, QKNorm.full])
@pytest.mark.parametrize("tied", [False, True])
def test_folding_keeps_the_function(norm, tied):
    source = Weights(replace(MODEL, multipliers=FACTORS, qk_norm=norm, tie_embeddings=tied))
    assert difference(logits(fold_multipliers(source)), logits(source)) < 1e-5
    assert fold_multipliers(source).config.multipliers == MultipliersConfig()


@pytest.mark.parametrize("factor", [one.name for one in fields(MultipliersConfig)])
def test_each_factor_changes_the_function(factor):
    """Control: the folding test would also pass for a factor that is never applied."""
    plain = Weights(MODEL)
    changed = Weights(replace(MODEL, multipliers=MultipliersConfig(**{factor: getattr(FACTORS, factor)})))
    assert difference(logits(changed), logits(plain)) > 1e-3
    assert fold_multipliers(plain) is plain


def test_weightless_query_norm_cannot_absorb_a_factor():
    llama4 = replace(MODEL, qk_norm=QKNorm.weightless, multipliers=MultipliersConfig(attention=0.5))
    with pytest.raises(ConfigError, match=r"model.multipliers.attention=0.5: cannot be folded: .* try 1.0"):
        fold_multipliers(Weights(llama4))
    other = Weights(replace(llama4, multipliers=MultipliersConfig(residual=0.5)))
    assert difference(logits(fold_multipliers(other)), logits(other)) < 1e-5


def test_an_export_computes_what_the_factors_did(tmp_path):
    """Compare with transformers on the exported weights. Control: a missing fold is noticed."""
    llama4 = replace(
        MODEL, qk_norm=QKNorm.weightless, shared_expert_hidden_size=40, multipliers=replace(FACTORS, attention=1.0)
    )
    with pytest.raises(ConfigError, match=r"model.multipliers.residual"):
        write_config(llama4)
    source, seen = Weights(llama4), []
    export(source, tmp_path / "out", verify=lambda directory: seen.append(compare_logits(source, directory)))
    assert len(seen) == 1 and seen[0] < 1e-4
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_logits(Weights(replace(llama4, multipliers=MultipliersConfig())), tmp_path / "out")
