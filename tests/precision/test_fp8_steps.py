"""FP8 quantises weights once per optimizer step, and an input once for all layers that read it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from model.layers import Linear, joint
from model.roles import Role
from precision.config import Recipe
from precision.fp8_emulated import EmulatedArithmetic
from precision.fp8_linear import Float8Gemm, Operand
from precision.gemm import Groups
from precision.native_gemm import NativeGemm
from precision.quantised_weights import QuantisedWeights
from precision.resolve import LayerGemms
from precision.weight_copies import WeightClock
from tests.support import tiny
from train.optim.config import Moments, OptimizerConfig
from train.optim.optimizer import elementwise

RECIPES = [recipe for recipe in Recipe if recipe is not Recipe.auto]
T, D, E, F = 32, 128, 3, 64
HEIGHTS = (256, 128, 64)
"""Rows of matrices with one input: no tile of blockwise or mxfp8 spans two of them."""


class Recorder(EmulatedArithmetic):
    """Notes what was quantised, and along what."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        super().__init__(recipe, dtype)
        self.seen: list[tuple[Operand, bool, bool]] = []

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> Any:
        self.seen.append((operand, rows, columns))
        return super().quantise(x, operand, groups, rows, columns)

    def take(self, operand: Operand) -> list[tuple[bool, bool]]:
        """Return what was noted of an operand since the last call."""
        found = [(rows, columns) for kind, rows, columns in self.seen if kind is operand]
        self.seen = [one for one in self.seen if one[0] is not operand]
        return found


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (torch.randn(*shape, generator=generator) * sizes).to(dtype)


def micro_batch(gemm: Float8Gemm, w: Tensor, groups: Groups | None = None) -> Tensor:
    y = gemm.linear(draw(T, D, dtype=torch.bfloat16).requires_grad_(), w, groups)
    y.sum().backward()
    return y.detach()


def made(dtype: torch.dtype = torch.bfloat16, recipe: Recipe = Recipe.blockwise) -> tuple[Recorder, Float8Gemm]:
    arithmetic = Recorder(recipe, dtype)
    return arithmetic, Float8Gemm(arithmetic, "here")


def load(w: nn.Parameter) -> None:
    layer = Linear(D, F, Role.query, LayerGemms(made()[1]))
    layer.weight = w
    layer.load_state_dict({"weight": draw(F, D, seed=3)})


NARROW = OptimizerConfig(lr=0.1, moments=Moments.bfloat16)
CHANGES = {
    "an optimizer step": lambda w: torch.optim.AdamW([w], lr=0.1).step(),
    "a step of the trainer's optimizer": lambda w: elementwise([{"params": [w]}], OptimizerConfig(lr=0.1)).step(),
    "a step with narrow moments": lambda w: elementwise([{"params": [w]}], NARROW).step(),
    "a foreach optimizer step": lambda w: torch.optim.AdamW([w], lr=0.1, foreach=True).step(),
    "a loaded checkpoint": load,
    "a write in place": lambda w: w.detach().copy_(draw(F, D, seed=2)),
    "other storage": lambda w: setattr(w, "data", draw(F, D, seed=2)),
}


def check_refresh(change: Any) -> None:
    arithmetic, gemm = made()
    w = nn.Parameter(draw(F, D, seed=1))
    for _ in range(4):  # the micro-batches of a step
        before = micro_batch(gemm, w)
    assert arithmetic.take(Operand.weight) == [(True, True)]
    change(w)
    after = micro_batch(gemm, w)
    assert not torch.equal(before, after)
    assert torch.equal(after, micro_batch(made()[1], nn.Parameter(w.detach().clone())))
    assert arithmetic.take(Operand.weight) == [(True, True)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_weight_is_quantised_again(change):
    check_refresh(change)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_without_versions_weights_would_be_stale(change, monkeypatch):
    monkeypatch.setattr(QuantisedWeights, "_state", lambda *args: [])
    with pytest.raises(AssertionError):
        check_refresh(change)


def test_experts_are_quantised_once_in_one_call():
    arithmetic, gemm = made()
    w = nn.Parameter(draw(E, 2, F // 2, D))
    groups = Groups(torch.tensor([16, 0, 16]))
    for _ in range(3):
        micro_batch(gemm, w.flatten(1, 2), groups)  # a view, as in GroupedGateUp
    assert arithmetic.take(Operand.weight) == [(True, True)]
    assert arithmetic.take(Operand.activation) == arithmetic.take(Operand.gradient) == [(True, True)] * 3


def test_a_gathered_weight_is_kept_until_it_is_freed():
    """FSDP2 writes into gathered parameters, which have the compute dtype, without a new version."""
    arithmetic, gemm = made()
    w = nn.Parameter(draw(F, D, dtype=torch.bfloat16))

    def gather(seed: int) -> None:
        with torch.autograd._unsafe_preserve_version_counter(w), torch.no_grad():
            w.copy_(draw(F, D, seed=seed))

    before = micro_batch(gemm, w)
    assert arithmetic.take(Operand.weight) == [(True, False), (False, True)]
    gather(1)
    assert not torch.equal(micro_batch(gemm, w), before)
    arithmetic.take(Operand.weight)
    gemm.weights.keep_while_gathered()
    stale = [micro_batch(gemm, w) for _ in range(2)][-1]
    assert arithmetic.take(Operand.weight) == [(True, True)]
    gather(2)
    assert torch.equal(micro_batch(gemm, w), stale), "control: a write that nobody tells of is not seen"
    gemm.weights.forget()
    assert not torch.equal(micro_batch(gemm, w), stale)


def test_quantised_weights_die_with_their_parameter():
    _, gemm = made()
    w = nn.Parameter(draw(F, D))
    micro_batch(gemm, w)
    assert len(gemm.weights._kept) == 1
    w.grad = None
    del w
    assert len(gemm.weights._kept) == 0


def passes(recipe: Recipe, dtype: torch.dtype, together: bool, heights: tuple[int, ...] = HEIGHTS) -> dict[str, Tensor]:
    """Return results and gradients of layers with one input, computed jointly or one by one, and what was quantised."""
    arithmetic = Recorder(recipe, dtype)
    layers = [Linear(D, height, Role.query, LayerGemms(Float8Gemm(arithmetic, "here"))) for height in heights]
    for seed, layer in enumerate(layers):
        layer.weight.data = draw(*layer.weight.shape, seed=seed + 1, dtype=torch.float64)
    x = draw(2, T, D, dtype=dtype).requires_grad_()
    grad = draw(2, T, sum(heights), seed=9, dtype=dtype)
    ys = [joint(x, layers)] if together else [layer(x) for layer in layers]
    torch.autograd.backward(ys, grad.split([y.shape[-1] for y in ys], -1))
    found = {"y": torch.cat(ys, -1).detach(), "x": x.grad}
    found |= {f"w{index}": layer.weight.grad for index, layer in enumerate(layers)}
    counts = {kind.value: len(arithmetic.take(kind)) for kind in Operand}
    return found | {"counts": torch.tensor([counts["activation"], counts["gradient"]])}


@pytest.mark.parametrize("recipe", RECIPES)
def test_joint_layers_equal_separate_ones(recipe):
    """To the bit; where matrices are stacked, but for the input gradient, which is rounded once instead of thrice."""
    found, wanted = (passes(recipe, torch.float64, together) for together in (True, False))
    is_stacked = recipe in (Recipe.blockwise, Recipe.mxfp8)
    assert wanted.pop("counts").tolist() == [3, 3] and found.pop("counts").tolist() == [1, 1 if is_stacked else 3]
    torch.testing.assert_close(found.pop("x"), wanted.pop("x"), rtol=1e-13 * is_stacked, atol=1e-12 * is_stacked)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_matrices_whose_tiles_would_be_shared_stay_apart():
    heights = (96, 160)
    found, wanted = (passes(Recipe.blockwise, torch.float64, together, heights) for together in (True, False))
    assert wanted.pop("counts").tolist() == [2, 2] and found.pop("counts").tolist() == [1, 2]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [Recipe.tensorwise, Recipe.rowwise])
def test_stacking_where_a_scale_spans_matrices_is_noticed(recipe, monkeypatch):
    monkeypatch.setattr(Recipe, "joint_multiple", property(lambda recipe: 16))
    found, wanted = (passes(recipe, torch.float64, together) for together in (True, False))
    assert not torch.allclose(found["x"], wanted["x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [OptimizerConfig(lr=0.1), NARROW], ids=["fused", "narrow moments"])
def test_a_step_of_the_optimizer_refreshes_bfloat16_copies(config):
    check_refresh_of_a_copy(config)


def test_without_clock_and_versions_copies_would_be_stale(monkeypatch):
    monkeypatch.setattr(WeightClock, "tick", lambda clock: setattr(clock, "ticks", 1))
    monkeypatch.setattr("precision.weight_copies.state_of", lambda weights: [])
    with pytest.raises(AssertionError, match="stale"):
        check_refresh_of_a_copy(OptimizerConfig(lr=0.1))


def check_refresh_of_a_copy(config: OptimizerConfig) -> None:
    clock, w = WeightClock(), nn.Parameter(draw(F, D))
    gemm = NativeGemm(torch.bfloat16, clock)
    clock.tick()
    w.grad = draw(F, D, seed=1)
    copy = gemm.narrowed(w)
    assert gemm.narrowed(w).data_ptr() == copy.data_ptr(), "kept"
    before = copy.clone()
    elementwise([{"params": [w]}], config).step()
    clock.tick()
    assert torch.equal(gemm.narrowed(w), w.bfloat16()), "stale"
    assert not torch.equal(gemm.narrowed(w), before)


def trained(
    root: Path, name: str, corpus: list[str], patches: dict[str, Any], layout: str
) -> list[tuple[float, float]]:
    """Return losses and gradient norms of three steps."""
    options = ["precision=bf16", "precision.backend=emulated", "precision.recipe=blockwise", "optimizer.lr=0.01"]
    with mock.patch.multiple(QuantisedWeights, **patches) if patches else nullcontext():
        run = tiny.trainer(root, name, [*corpus, *options, *layout.split()])
        metrics = [run.train_step(step) for step in range(3)]
    return [(one.loss.item(), one.gradient_norm.item()) for one in metrics]


def nothing_kept(*args: Any) -> None:
    return None


LAYOUTS = {"": 1, "parallel.dp_shard=2": 2, "parallel.pp=2 parallel.dp_shard=2": 4}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_weights_change_no_bit_of_a_run(layout, tmp_path, small_corpus, ranks):
    found = ranks(LAYOUTS[layout], trained, tmp_path, "kept", small_corpus, {}, layout)
    wanted = ranks(LAYOUTS[layout], trained, tmp_path, "anew", small_corpus, {"owners": nothing_kept}, layout)
    assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("layout, broken", [("", "_state"), ("parallel.pp=2 parallel.dp_shard=2", "forget")])
def test_stale_weights_change_a_run(layout, broken, tmp_path, small_corpus, ranks):
    count = LAYOUTS[layout]
    found = ranks(count, trained, tmp_path, "stale", small_corpus, {broken: nothing_kept}, layout)
    wanted = ranks(count, trained, tmp_path, "kept", small_corpus, {}, layout)
    assert found != wanted
