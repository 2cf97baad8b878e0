"""The Transformer Engine backend on the CPU: TE's own Python over a stub of its compiled extension.

Its results equal the emulation's to the last bit, whole training steps included. Each planted error in our file and
each rename in TE's API is noticed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from precision import fp8_emulated
from precision import transformer_engine as backend
from precision.config import Recipe
from precision.fp8_linear import Float8Gemm
from precision.gemm import Groups
from tests.support import tiny
from tests.support.fakes.transformer_engine_stub import Extension, installed

T, D, F, E = 40, 64, 96, 4
COUNTS = [64, 0, 32, 96]
"""Rows per expert: multiples of every recipe's padding, one of them 0, and in all fewer than the `C` rows."""
C = sum(COUNTS) + 32
RECIPES = list(backend.RECIPES)


@pytest.fixture
def extension() -> Iterator[Extension]:
    with installed() as found:
        yield found


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (torch.randn(*shape, generator=generator) * sizes).to(dtype)


def passes(products: Any, recompute: Any = None) -> dict[str, Tensor]:
    """Return results and gradients of a matrix in bfloat16, which is quantised at each use, and of experts in float32,
    which are quantised once. Omit rows of no expert.
    """
    groups, found = Groups(torch.tensor(COUNTS)), {}
    for name, x, w, split in (
        ("matrix", draw(2, T, D), draw(F, D), None),
        ("experts", draw(C, D), draw(E, F, D, dtype=torch.float32), groups),
    ):
        x, w = x.requires_grad_(), w.requires_grad_()
        y = products.linear(x, w, split) if recompute is None else recompute(products.linear, x, w, split)
        grad = draw(*y.shape)
        grads = torch.autograd.grad(y, (x, w), grad)
        used = slice(None) if split is None else slice(sum(COUNTS))
        found |= {f"{name} y": y[used].detach(), f"{name} x": grads[0][used], f"{name} w": grads[1]}
        found[f"{name} x alone"] = products.input_gradient(grad, w.detach(), split)[used]
        found[f"{name} w alone"] = products.weight_gradient(grad, x.detach(), split)
    return found


def make(recipe: Recipe, module: Any = backend) -> Float8Gemm:
    return Float8Gemm(module.arithmetic(recipe, torch.bfloat16), "a test")


def by_emulation(recipe: Recipe) -> Float8Gemm:
    return make(recipe, fp8_emulated)


assert_same_bits = partial(torch.testing.assert_close, rtol=0, atol=0)


def check(module: Any, recipe: Recipe, extension: Extension) -> None:
    """Compare the results of a backend with the emulation, and the flags of its calls with those of TE's modules."""
    products = make(recipe, module)
    assert_same_bits(passes(products), passes(by_emulation(recipe)))
    flags = {"TN": recipe is Recipe.blockwise, "NN": True, "NT": True}
    for call in extension.products():
        assert call.use_split_accumulator is flags[call.layout] and call.grad is (call.layout != "TN")
        assert call.m_splits in (None, COUNTS) and call.single_output in (None, call.layout != "NT")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("transposes", [True, False], ids=["hopper", "blackwell"])
def test_results_equal_the_emulation(recipe, transposes):
    with installed(transposes=transposes) as extension:
        check(backend, recipe, extension)


def fail(y: Tensor) -> Tensor:
    raise RuntimeError("cuBLAS:\n not supported")


@pytest.mark.parametrize(
    "sabotage, told",
    [
        (lambda y: y * 1.25, "computes products of a matrix (off by 2.5e-01) on cpu unlike the emulation"),
        (lambda y: y * torch.nan, "computes products of a matrix (off by nan) on cpu unlike the emulation"),
        (fail, "fails on cpu (RuntimeError: cuBLAS: not supported)"),
    ],
)
def test_a_trial_notices_other_products(sabotage, told, extension):
    extension.sabotage = sabotage
    assert told in backend._trial_failure.__wrapped__(Recipe.blockwise, "cpu")


@pytest.mark.parametrize("recipe, name", [(r, n) for r in RECIPES for n in ("_data", "_scale_inv")])
def test_a_trial_notices_other_bytes_and_scales(recipe, name, extension, monkeypatch):
    """Comparing matmul results alone would miss a change of one byte or scale, which is below the rounding error."""
    real = extension._storage

    def other(*arguments: Any) -> Any:
        storage = real(*arguments)
        for attribute, _ in type(storage)._INNER_TENSORS:
            if attribute.endswith(name) and getattr(storage, attribute) is not None and storage.size()[0]:
                place = getattr(storage, attribute).view(-1)
                place[0] = place[0] + 1
        return storage

    monkeypatch.setattr(extension, "_storage", other)
    reason = backend._trial_failure.__wrapped__(recipe, "cpu")
    assert "computes bytes or scales for the rows of the activation on cpu unlike" in reason


def test_without_gradients_no_columns_are_made(extension):
    with torch.no_grad():
        make(Recipe.blockwise).linear(draw(T, D), draw(F, D))
    assert not any(call.columnwise for call in extension.quantised())


def kept_by(forward: Any) -> list[Tensor]:
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        forward()
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_activations_are_saved_as_fp8_columns(recipe, extension):
    products, w = make(recipe), draw(F, D).requires_grad_()
    x = draw(128, D).requires_grad_()
    weight, *columns = kept_by(lambda: products.linear(x, w))
    assert weight.data_ptr() == w.data_ptr()
    assert sum(t.numel() for t in columns if t.dtype is torch.uint8 and t.numel() >= x.numel()) == x.numel()
    assert all(t.dtype in (torch.uint8, torch.float32) for t in columns)
    assert sum(t.numel() * t.element_size() for t in columns) < 1.1 * x.numel()


def calls_of_experts(module: Any, recipe: Recipe, experts: int, extension: Extension) -> tuple[int, int]:
    """Return how often two micro-batches of a step quantise and multiply."""
    products, w = make(recipe, module), draw(experts, 32, D, dtype=torch.float32).requires_grad_()
    extension.calls.clear()
    for _ in range(2):
        x = draw(32 * experts, D).requires_grad_()
        products.linear(x, w, Groups(torch.tensor([32] * experts))).sum().backward()
    return len(extension.quantised()), len(extension.products())


@pytest.mark.parametrize("recipe", RECIPES[:1] + [pytest.param(one, marks=pytest.mark.slow) for one in RECIPES[1:]])
def test_calls_do_not_grow_with_experts(recipe, extension):
    assert {calls_of_experts(backend, recipe, experts, extension) for experts in (8, 128)} == {(5, 6)}


def test_experts_quantised_one_by_one_are_counted(extension):
    together = "tuple(tex.split_quantize(used, counts, [quantizer] * len(counts)))"
    one_by_one = mutant(together, "tuple(map(quantizer, used.split(counts)))")
    assert calls_of_experts(one_by_one, Recipe.blockwise, 8, extension) == (8 * 5, 6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputation_quantises_again(recipe, extension):
    products, w = make(recipe), draw(F, D, dtype=torch.float32).requires_grad_()
    x = draw(128, D).requires_grad_()
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    kept = kept_by(lambda: run(products.linear, x, w))
    assert not any(t.dtype is torch.uint8 for t in kept)
    extension.calls.clear()
    assert_same_bits(passes(products, run), passes(by_emulation(recipe)))
    times = sum(call.splits == COUNTS and call.shape[1] == D for call in extension.quantised())
    assert times == 3, "forward, recomputed, and for the gradient alone"


def test_a_second_backward_pass_is_equal_and_no_rows_give_zeros(extension):
    products, w = make(Recipe.blockwise), draw(F, D).requires_grad_()
    y = products.linear(draw(T, D), w)
    grads = [torch.autograd.grad(y, w, draw(T, F), retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    experts = draw(E, F, D).requires_grad_()
    y = products.linear(draw(32, D)[:0], experts, Groups(torch.zeros(E, dtype=torch.int64)))
    y.sum().backward()
    assert y.shape == (0, F) and not experts.grad.any()


def test_the_backend_never_synchronises():
    """The only synchronisation is in `Groups.host`, once per layer."""
    waits = {"item", "tolist", "cpu", "numpy", "synchronize", "float", "bool", "int"}
    for node in ast.parse(Path(backend.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            calls = [ast.unparse(call.func).split(".")[-1] for call in ast.walk(node) if isinstance(call, ast.Call)]
            assert not waits & set(calls)


BROKEN = {
    "NT for the input's gradient": ('"NN", groups', '"NT", groups'),
    "NN for the weight's gradient": ('"NT", groups', '"NN", groups'),
    "operands exchanged": ("self._product(w, x,", "self._product(x, w,"),
    "no columns": ("columnwise=columns", "columnwise=False"),
    "columns without rows": ("rowwise=rows or beside", "rowwise=rows"),
    "one scale per row for weights": ("quantizer.internal = True", "quantizer.block_scaling_dim = 1"),
    "weights as activations": ("Operand.activation, Operand.weight, Op", "Operand.weight, Operand.activation, Op"),
    "gradients in the forward pass's format": ('mode="backward"', 'mode="forward"'),
    "rows kept instead of columns": (
        "rowwise_usage=False, columnwise_usage=True",
        "rowwise_usage=True, columnwise_usage=False",
    ),
    "emptied while it is kept": ("_shallow_copy(part).prepare_for_saving()", "part.prepare_for_saving()"),
    "a shell that is shared": ("copy = object.__new__(type(part))", "return part"),
    "experts' matrices in one buffer": ("single_output=is_rows", "single_output=True"),
    "counts of other experts": ("None else groups.host\n", "None else groups.host[::-1]\n"),
    "experts' matrices as one": ("[x.shape[1]] * len(x)", "[x.shape[1] * len(x)]"),
    "one expert too few": ("[None] * len(a.parts),", "[None] * len(a.parts), layout='TN') if 0 else dict("),
    "no split accumulator": ("use_split_accumulator=split", "use_split_accumulator=False"),
    "flags in another order": ('zip(("TN", "NN", "NT"), splits', 'zip(("NT", "NN", "TN"), splits'),
    "float32 results": ("out_dtype=self.compute_dtype", "out_dtype=torch.float32"),
    "missing argument": ("list(b.parts),\n", ""),
    "unknown keyword": ("m_splits=groups.host", "splits=groups.host"),
    "unknown keyword of both products": ("use_split_accumulator=split", "split_accumulator=split"),
    "unknown keyword of a method": ("columnwise_usage=True", "column_usage=True"),
    "unknown keyword of a factory": ("num_quantizers=2", "quantizers=2"),
    "unknown keyword of a question": ("return_reason=True", "reason=True"),
    "unknown function": ("import general_gemm, general_grouped_gemm", "import general_gemm, grouped_gemm"),
    "unknown class": ("Float8CurrentScaling, MXFP8BlockScaling", "Float8CurrentScaling, MXFP8Scaling"),
    "unknown constant": ("_2X_ACC_DGRAD, _2X_ACC_FPROP", "_2X_ACC_INPUT, _2X_ACC_FPROP"),
    "unknown method of a quantizer": ("quantizer.set_usage(", "quantizer.set_usages("),
    "unknown method of a storage": ("part.restore_from_saved", "part.restore_saved"),
    "unknown field of a recipe": ("scaling.fp8_gemm_wgrad", "scaling.gemm_wgrad"),
    "unknown flag of a product": ("product.use_split_accumulator", "product.split_accumulator"),
}
BROKEN_TENSORWISE = {"gradients in the forward pass's format", "flags in another order"}
"""Errors planted with the tensorwise recipe. The blockwise recipe shows all others."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_unchanged_copy_agrees_and_its_trial_succeeds(recipe, extension):
    """Control: the checks pass for a copy of the backend's module without a planted error."""
    copy = mutant("", "")
    check(copy, recipe, extension)
    assert copy._trial_failure.__wrapped__(recipe, "cpu") is copy._unsupported(recipe) is None


@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_error_is_noticed(name, extension):
    broken = mutant(*BROKEN[name])
    recipe = Recipe.tensorwise if name in BROKEN_TENSORWISE else Recipe.blockwise
    with pytest.raises(Exception) as caught:  # anything that TE's Python or the stub raises
        check(broken, recipe, extension)
        broken._unsupported(recipe)
    assert not isinstance(caught.value, SyntaxError | NameError)


def test_an_unknown_key_of_a_storage_is_noticed(extension):
    with pytest.raises(KeyError):
        list(mutant("fp8_scale_inv", "scale_inv")._differences(Recipe.tensorwise, torch.device("cpu")))


def mutant(old: str, new: str) -> ModuleType:
    text = Path(backend.__file__).read_text()
    assert old in text
    module = ModuleType("mutant")
    sys.modules["mutant"] = module  # where dataclasses look up the module
    try:
        exec(compile(text.replace(old, new), "mutant", "exec"), vars(module))
    finally:
        del sys.modules["mutant"]
    return module


FP8 = ["precision.compute=bfloat16", "precision.recipe=blockwise", "optimizer=sgd", "training.clip_norm=null"]


def figures(root: Path, name: str, corpus: list[str], *overrides: str) -> dict[str, Any]:
    """Run one step of a tiny run by Transformer Engine, or by the backend in `overrides`."""
    with installed():
        return tiny.figures(root, name, [*corpus, *FP8, "precision.backend=te", *overrides], steps=1)


@pytest.fixture(scope="module")
def emulated_run(tmp_path_factory, small_corpus):
    root = tmp_path_factory.mktemp("emulated")
    return tiny.figures(root, "reference", [*small_corpus, *FP8, "precision.backend=emulated"], steps=1)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_training_equals_the_emulation(recompute, tmp_path, small_corpus, emulated_run):
    assert_same_bits(figures(tmp_path, "te", small_corpus, f"parallel.recompute={recompute}"), emulated_run)


@pytest.mark.parametrize("layout", [pytest.param("parallel.ep=2", marks=pytest.mark.slow), "parallel.dp_shard=2"])
def test_two_ranks(layout, tmp_path, small_corpus, ranks):
    found = ranks(2, figures, tmp_path, "te", small_corpus, layout)
    wanted = ranks(2, figures, tmp_path, "reference", small_corpus, layout, "precision.backend=emulated")
    assert_same_bits(found, wanted)
