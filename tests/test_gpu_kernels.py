"""Tests of kernels and layers that need a GPU, with PyTorch and Triton alone: part of `make test-gpu` and `bench.gpu`.

tests/model/test_gpu_cases.py runs their comparisons on a CPU. These tests have not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import budget
from bench.gpu.split import launched, observed
from model import head as head_module
from model.attention.layer import varlen_attention
from model.attention.plan import ForwardContext
from model.config import ModelConfig, RouterConfig
from model.head import IGNORED, Head, token_losses
from model.init import initialise, reset_buffers
from model.kernels import TritonKernels
from model.load_balance import Balancer
from model.roles import Role
from model.transformer import Layer, Stack, Transformer
from parallel.layout import Recompute
from precision.config import Compute, KernelKind, PrecisionConfig
from precision.resolve import Precision, resolve
from tests.model.attention.test_segments import figures, inputs, masked, positions
from tests.support.kernels.head_cases import FLAWS, STEPS, head_errors
from tests.support.kernels.kernel_cases import GATES
from tests.support.models import optimizer_of, small
from train.optim.config import OptimizerConfig

pytestmark = pytest.mark.gpu

SMALL = small(router=RouterConfig(force_balanced=True))
"""Balanced, so that rounding moves no token to another expert."""
LAYER = ModelConfig(
    hidden_size=256, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=64, expert_hidden_size=256,
    shared_expert_hidden_size=256, num_experts=8,
)  # fmt: skip
"""Scout's MoE layer, narrower. The number of launches does not depend on its widths."""
BFLOAT16_GATE = 3e-2
"""Largest error of bfloat16, as the norm of the difference over the norm of the reference."""


def errors(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest error among tensors, each relative to its norm."""
    pairs = [(x.detach().cpu().double(), y.detach().cpu().double()) for x, y in zip(found, wanted, strict=True)]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def varlen_error(device: str, dtype: torch.dtype, chunk: int | None) -> float:
    """Return the error of packed, grouped-query attention in one call, and of its gradients, against a mask in float64."""
    rows = positions(64)
    bounds = rows if chunk is None else rows % chunk
    context = ForwardContext(rows, torch.device(device))
    found = figures(
        lambda q, k, v: varlen_attention(q, k, v, context, chunk), *(x.to(device, dtype) for x in inputs(64))
    )
    return errors(found, figures(masked(bounds), *inputs(64)))


def loss_error(device: str, compute: Compute, words: int = 1000) -> float:
    """Return the error of the loss by blocks of words, and of its gradients, against whole logits in float64."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 30, 64), (words, 64)))
    labels = torch.randint(words, (2, 30), generator=generator).index_fill_(1, torch.tensor(3), IGNORED)

    def results(device: str, precision: Precision, whole: bool) -> list[Tensor]:
        with torch.device("meta"):
            head = Head(64, words, Role.head, precision.plain)
        head = head.to(precision.config.master_dtype).to_empty(device=device)
        with torch.no_grad():
            head.weight.copy_(w)
        given = x.to(device, precision.compute_dtype).requires_grad_()
        wanted = labels.to(device)
        y = token_losses(head(given).flatten(0, 1), wanted.flatten())[None] if whole else head(given, wanted)
        return [y.flatten(), *torch.autograd.grad(y.sum(), [given, head.weight])]

    exact = results("cpu", resolve(PrecisionConfig(Compute.float64)), whole=True)
    return errors(results(device, resolve(PrecisionConfig(compute), torch.device(device)), whole=False), exact)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_MULTIPLE", 64)
    monkeypatch.setattr(head_module, "_BLOCK_BYTES", 4 * 40 * 64)


def model_error(device: str, precision: Precision) -> float:
    """Return the error of the losses and of all gradients of a model against the plain one on a CPU in float64."""
    rows = positions(64)
    tokens = torch.randint(SMALL.vocab_size, rows.shape, generator=torch.Generator().manual_seed(0))

    def results(device: str, precision: Precision) -> list[Tensor]:
        model = Transformer(SMALL, precision).to(precision.config.master_dtype)
        initialise(model, SMALL, 1)
        model = model.to(device)
        context = ForwardContext(rows, torch.device(device), float(rows.numel()))
        context.labels_BT = tokens.roll(-1, 1).to(device)
        losses = model(tokens.to(device), context)
        losses.sum().backward()
        whole = torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])
        return [losses, whole]

    return errors(results(device, precision), results("cpu", resolve(PrecisionConfig(Compute.float64))))


def layer_step(device: str, documents: int, tokens: int = budget.TOKENS) -> Callable[[], None]:
    """Return a forward and backward pass of a MoE layer. Its parameters have gradients, as in `bench.budget`."""
    where = torch.device(device)
    precision = resolve(PrecisionConfig(Compute.bfloat16), where)
    with torch.device("meta"):
        layer = Layer(LAYER, LAYER.blocks[0], precision.at(0, 1))
    stack = Stack(None, {"0": layer}, None, None).to_empty(device=where)
    generator = torch.Generator(where).manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    reset_buffers(stack)
    context = ForwardContext(torch.arange(tokens // documents).repeat(documents)[None], where, float(tokens))
    context.prepare(LAYER, torch.bfloat16, precision.attention)
    x = torch.randn(1, tokens, LAYER.hidden_size, device=where, generator=generator).bfloat16().requires_grad_()
    grad = torch.ones_like(x)

    def step() -> None:
        x.grad = None
        stack(x, context).backward(grad)

    step()  # gives the parameters gradients, and compiles Triton's kernels
    return step


def training_step(device: str) -> Callable[[], None]:
    """Return an optimizer step of a model on packed documents, whose context is on the device before it begins."""
    where, rows = torch.device(device), positions(64)
    precision = resolve(PrecisionConfig(Compute.bfloat16), where)
    model = Transformer(SMALL, precision)
    initialise(model, SMALL, 1)
    model = model.to(where)
    optimizer = optimizer_of(model, OptimizerConfig())
    model.clock.tick()
    tokens = torch.randint(SMALL.vocab_size, rows.shape, generator=torch.Generator().manual_seed(0)).to(where)
    context = ForwardContext(rows, where, float(rows.numel()))
    context.prepare(SMALL, torch.bfloat16, precision.attention)
    context.labels_BT = tokens.roll(-1, 1)

    def step() -> None:
        for _ in range(2):
            model(tokens, context).sum().backward()
        optimizer.step()
        model.clock.tick()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step


def engine_step(device: str) -> Callable[[], None]:
    """Return a step of an engine on packed documents, which copies its inputs ahead, clips and balances. Engines need
    the libraries of configurations.
    """
    from data.loader import Batch
    from parallel import parallelize
    from parallel.layout import ParallelConfig
    from parallel.mesh import meshes_of_rank
    from train.engine.base import optimizer_step
    from train.engine.fsdp import TorchEngine

    rows, meshes = positions(64), meshes_of_rank(ParallelConfig().resolve(1), 0)
    placed = parallelize.build(SMALL, PrecisionConfig(Compute.bfloat16), meshes, torch.device(device), 1)
    engine, balancer = TorchEngine(placed, OptimizerConfig()), Balancer(placed.model)
    tokens = torch.randint(SMALL.vocab_size, rows.shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        batch = Batch(tokens, tokens.roll(-1, 1), rows, torch.zeros(len(rows), dtype=torch.int64))
        engine.prepare(batch, 1)
        optimizer_step(engine, balancer, batch, 1, 1.0, 1.0)

    step()
    return step


@pytest.mark.parametrize("chunk", [None, 5], ids=["documents", "chunks"])
def test_varlen_attention(chunk):
    assert varlen_error("cuda", torch.bfloat16, chunk) < BFLOAT16_GATE


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("name", STEPS)
def test_heads_and_norms(name, dtype):
    found = head_errors(name, TritonKernels(), getattr(torch, dtype), "cuda")
    assert {key: error for key, error in found.items() if not error < 2 * GATES[dtype]} == {}


@pytest.mark.parametrize("what", FLAWS)
def test_the_comparison_of_heads_notices(what):
    found = head_errors("normalised, temperature", TritonKernels(), torch.float32, "cuda", what)
    assert max(found["q"], found["gradient"]) > 0.1


@pytest.mark.parametrize("compute, gate", [(Compute.float64, 1e-12), (Compute.float32, 1e-5), (Compute.bfloat16, 3e-2)])
def test_the_loss_by_blocks(monkeypatch, compute, gate):
    small_blocks(monkeypatch)
    assert loss_error("cuda", compute) < gate


@pytest.mark.parametrize("compute, gate", [(Compute.float64, 1e-10), (Compute.bfloat16, 0.1)])
def test_the_arrangement_for_gpus(compute, gate):
    precision = resolve(PrecisionConfig(compute), torch.device("cuda"))
    assert precision.kernels is KernelKind.triton
    assert model_error("cuda", precision) < gate


@pytest.mark.parametrize("documents", [1, 32])
def test_launches_are_those_of_the_budget(documents):
    spans, _ = observed(layer_step("cuda", documents), torch.device("cuda"))
    counted = budget.LayerCase(LAYER, Recompute.none)(documents)[0].launches
    found = sorted(name for name, _, _ in spans)
    assert launched(spans) == pytest.approx(counted.total(), rel=0.2), (counted, found)


@pytest.mark.parametrize("make", [training_step, engine_step])
def test_no_step_synchronises(make):
    if make is engine_step:
        pytest.importorskip("hydra")
    step = make("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
