"""What `parallel.compile` compiles, in the arrangement for GPUs on meta tensors and on a CPU, in each recompute mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import ConfigError
from model import transformer
from model.attention.plan import ForwardContext
from model.transformer import Transformer
from parallel import activation_checkpoint, compile
from parallel.layout import ParallelConfig, Recompute
from precision.config import AttentionKind, Backend, Compute, PrecisionConfig
from precision.resolve import resolve
from tests.support.models import build, small

GPU, META, LENGTH = torch.device("cuda"), torch.device("meta"), 48
PACKINGS = [[48], [12, 36], [10, 10, 10, 18]]
MODEL = small(hidden_size=64, head_dim=16, expert_hidden_size=64, dense_hidden_size=64)
MODES = [
    Recompute.full,
    *(pytest.param(mode, marks=pytest.mark.slow) for mode in (Recompute.none, Recompute.selective)),
]


def gpu_model() -> Transformer:
    with META:
        return Transformer(MODEL, resolve(PrecisionConfig(Compute.bfloat16), GPU))


def context_of(model: Transformer, lengths: list[int], device: torch.device, is_static: bool = True) -> ForwardContext:
    context = ForwardContext(torch.cat([torch.arange(n) for n in lengths])[None], device, float(LENGTH))
    context.is_static = is_static
    context.prepare(model.config, model.compute_dtype, model.attention)
    return context


def run(model: Transformer, lengths: list[int], device: torch.device, is_static: bool = True) -> Tensor:
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64, device=device)
    y = model(tokens, context_of(model, lengths, device, is_static))
    y.backward(torch.ones_like(y))
    return y


def compiled(model: Transformer, mode: Recompute, **options: Any) -> compile.GraphCompiler:
    found = compile.apply(model, backend="aot_eager", **options)
    activation_checkpoint.apply(model, mode, compiled=True)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_dense_halves_compile_once_whatever_the_documents(mode):
    """Layers 0 and 2 are dense, 1 and 3 have experts. Chunked attention is in 0 to 2. So there are 5 graphs: a dense
    layer, both kinds of attention with experts, and both halves of a shared expert.
    """
    model = gpu_model()
    compiler = compiled(model, mode, traces_whole=True)
    counts = []
    for lengths in PACKINGS:  # of one, two and four documents
        run(model, lengths, META)
        counts.append(compiler.graphs)
    assert counts == [5, 5, 5]


@pytest.mark.slow
def test_sizes_that_are_not_static_compile_again():
    model = gpu_model()
    compiler = compiled(model, Recompute.none, traces_whole=True)
    for lengths in PACKINGS:
        run(model, lengths, META, is_static=False)
    assert compiler.graphs > 5, "the control"


@pytest.mark.slow
@pytest.mark.parametrize("mode", Recompute)
def test_compiled_layers_compute_the_same_in_each_mode(mode):
    models = [build(MODEL, seed=1) for _ in range(2)]
    compiler = compiled(models[0], mode)
    cpu = torch.device("cpu")
    found, wanted = (run(model, PACKINGS[2], cpu) for model in models)
    assert compiler.graphs == 5
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11, msg=name)


def test_a_configuration_that_compiles_nothing_is_rejected(monkeypatch):
    model = build(MODEL, seed=1)
    for name in ("forward", "attend"):
        method = getattr(transformer.Layer, name)
        monkeypatch.setattr(transformer.Layer, name, torch.compiler.disable(method))
    for layer in model.layers.values():
        if layer.is_moe:
            layer.ffn.shared = None
    compiled(model, Recompute.none)
    with pytest.raises(ConfigError, match=r"parallel\.compile=true: nothing could be compiled: .*; try false"):
        run(model, PACKINGS[0], torch.device("cpu"))


def test_a_graph_break_of_a_whole_part_is_an_error(monkeypatch):
    def printing(*args: Any) -> Any:
        torch._dynamo.graph_break()
        return honest(*args)

    honest = transformer.Layer.attend
    monkeypatch.setattr(transformer.Layer, "attend", printing)
    model = gpu_model()
    compiled(model, Recompute.none, traces_whole=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(model, PACKINGS[0], META)


def test_parts_are_whole_where_nothing_breaks_them():
    plain, eight = PrecisionConfig(Compute.bfloat16), PrecisionConfig(Compute.bfloat16, backend=Backend.te)
    one, varlen = ParallelConfig().resolve(2), AttentionKind.varlen
    assert compile.traces_whole(one, plain, varlen)
    assert not compile.traces_whole(ParallelConfig(tp=2).resolve(2), plain, varlen)
    assert not compile.traces_whole(one, eight, varlen)
    assert not compile.traces_whole(one, plain, AttentionKind.segments)
