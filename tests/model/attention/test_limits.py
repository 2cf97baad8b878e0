"""Heads, dtypes, GPUs and versions of torch that flash attention cannot take are rejected in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.torch_version import TorchVersion

from core.config import load
from core.errors import ConfigError
from model.attention.limits import check_heads, slower_heads
from parallel.layout import ParallelConfig
from parallel.mesh import meshes_of_rank
from parallel.parallelize import build
from precision.config import AttentionKind, Compute, KernelKind, PrecisionConfig
from precision.resolve import CPU, resolve
from tests.support.models import small
from tests.support.tiny import TINY
from train.config import TrainConfig, check

GPU = torch.device("cuda")
BFLOAT16 = PrecisionConfig(Compute.bfloat16)
NAMED = replace(BFLOAT16, attention=AttentionKind.varlen)
SEGMENTS = replace(BFLOAT16, attention=AttentionKind.segments)


@pytest.mark.parametrize("kind", [BFLOAT16, NAMED], ids=["auto", "varlen"])
@pytest.mark.parametrize("width", [12, 100, 264])
def test_a_width_that_flash_attention_lacks_is_rejected(kind, width):
    reason = f"flash attention takes heads of multiples of 8 up to 256, not model.head_dim={width}; try segments"
    with pytest.raises(ConfigError) as caught:
        check_heads(small(head_dim=width), kind, GPU)
    assert str(caught.value) == f"precision.attention={kind.attention.value}: {reason}"


def test_other_widths_and_other_attention_pass():
    for width in (8, 24, 128, 256):
        check_heads(small(head_dim=width), NAMED, GPU)
    for precision, device in ((SEGMENTS, GPU), (BFLOAT16, CPU), (PrecisionConfig(), GPU)):
        check_heads(small(head_dim=12), precision, device)


def test_the_check_precedes_the_model(monkeypatch):
    """It is part of the checks of a run on a machine with a GPU, and of a model that is built from Python."""
    words = [*TINY, "precision=bf16", "precision.kernels=torch", "model.vocab_size=1024"]
    with pytest.raises(ConfigError, match=r"precision.attention=auto: flash attention takes .* model.head_dim=12; try"):
        build(small(head_dim=12), BFLOAT16, meshes_of_rank(ParallelConfig().resolve(1), 0), GPU, 0)
    check(load("train", TrainConfig, [*words, "model.head_dim=12"]), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"not model.head_dim=12; try segments"):
        check(load("train", TrainConfig, [*words, "model.head_dim=12"]), 1)
    check(load("train", TrainConfig, [*words, "model.head_dim=12", "precision.attention=segments"]), 1)


def rejected(precision: PrecisionConfig, device: torch.device = GPU) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(precision, device)
    return str(caught.value)


def test_what_cannot_run_is_no_silent_fallback(monkeypatch):
    assert rejected(NAMED, CPU).startswith(
        "precision.attention=varlen: flash attention of varying lengths runs on GPUs"
    )
    wide = replace(NAMED, compute=Compute.float32)
    assert "has no float32: add precision.compute=bfloat16; try segments" in rejected(wide)
    assert resolve(BFLOAT16, GPU).attention is AttentionKind.varlen
    assert resolve(PrecisionConfig(), GPU).attention is resolve(BFLOAT16).attention is AttentionKind.segments
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "attention=auto: flash attention needs a GPU of compute capability 8.0" in rejected(BFLOAT16)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    assert rejected(BFLOAT16).endswith("with grouped heads: pip install 'torch>=2.12'; try segments")
    assert resolve(SEGMENTS, GPU).attention is AttentionKind.segments


def test_heads_without_triton_are_named():
    triton, plain = (resolve(replace(BFLOAT16, kernels=kind), GPU) for kind in (KernelKind.auto, KernelKind.torch))
    line = slower_heads(small(head_dim=24), triton)
    assert line and line.startswith("model.head_dim=24 is no power of two: PyTorch's operations")
    assert slower_heads(small(head_dim=16), triton) is slower_heads(small(head_dim=24), plain) is None
