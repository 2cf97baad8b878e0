"""The comparisons of tests/test_gpu_kernels.py run on a CPU with stand-ins for the kernels, and notice what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.split import observed
from model import head
from model.attention import layer as attention
from model.attention.plan import ForwardContext
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from tests.model.test_gpu_path import flash
from tests.test_gpu_kernels import (
    engine_step,
    layer_step,
    loss_error,
    model_error,
    small_blocks,
    training_step,
    varlen_error,
)


@pytest.mark.parametrize("chunk", [None, 5], ids=["documents", "chunks"])
def test_varlen_attention_is_compared(monkeypatch, chunk):
    monkeypatch.setattr(attention, "varlen_attn", flash)
    assert varlen_error("cpu", torch.float64, chunk) < 1e-12
    honest = ForwardContext.borders
    monkeypatch.setattr(ForwardContext, "borders", lambda self, chunk: honest(self, 7))
    assert varlen_error("cpu", torch.float64, chunk) > 0.1


def test_the_loss_by_blocks_is_compared(monkeypatch):
    small_blocks(monkeypatch)
    assert loss_error("cpu", Compute.float64) < 1e-12 < loss_error("cpu", Compute.bfloat16) < 3e-2
    honest = head._blocks
    monkeypatch.setattr(head, "_blocks", lambda *sizes: list(honest(*sizes))[1:])
    assert loss_error("cpu", Compute.float64) > 0.1


def test_a_model_is_compared():
    assert model_error("cpu", resolve(PrecisionConfig(Compute.float64))) == 0
    assert 1e-4 < model_error("cpu", resolve(PrecisionConfig(Compute.bfloat16))) < 0.1


def test_a_layer_and_a_step_run():
    layer_step("cpu", 8, tokens=128)()
    engine_step("cpu")()
    step = training_step("cpu")
    spans, wall_ms = observed(step, torch.device("cpu"))
    assert {name for name, _, _ in spans} >= {"aten::mm", "aten::add_"} and wall_ms > 0
