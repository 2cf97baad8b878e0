"""Hold what a GPU has to do for a layer and the loss: launches, host synchronisations, bytes. Controls break each once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import budget, budget_table
from bench.budget_step import StepCase
from bench.counting import Shell
from core.memory import upload
from model import moe
from model.attention import layer as attention
from model.attention import plan
from parallel import expert_parallel
from parallel.checks.counting import Counter
from parallel.layout import DispatchMethod, Recompute
from precision.fp8_linear import Operand
from precision.native_gemm import NativeGemm
from precision.quantised_weights import QuantisedWeights
from precision.weight_copies import WeightCopies
from tests.support.models import small


def test_launches_do_not_grow_with_documents():
    counts = budget.launches()
    for layer, prepared in counts.values():
        assert layer.launches.total() <= budget_table.MOST_LAUNCHES, layer.launches
        assert prepared.launches.total() <= budget_table.MOST_PREPARED, prepared.launches
        assert all(layer.moved[name] <= most for name, most in budget_table.MOST_MOVED.items()), layer.moved
        assert not layer.syncs and not prepared.syncs


def test_a_loop_over_documents_exceeds_the_budget(monkeypatch):
    def loop(q: Tensor, k: Tensor, v: Tensor, ends: Any, *rest: Any, **options: Any) -> Tensor:
        lengths = [len(q) // (len(ends) - 1)] * (len(ends) - 1)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([honest(*part, ends, *rest, **options) for part in parts])

    honest = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", loop)
    case = budget.LayerCase()
    assert case(32)[0].launches.total() > 1.05 * case(1)[0].launches.total()


def test_a_wait_for_the_device_is_counted(monkeypatch):
    def waiting(*args: Any) -> Any:
        args[1].groups.counts_E.sum().item()
        return honest(*args)

    honest = moe.dispatch_rows
    monkeypatch.setattr(moe, "dispatch_rows", waiting)
    assert budget.LayerCase()(1)[0].syncs == {"_local_scalar_dense": 1}


def test_tables_made_for_each_document_exceed_the_budget(monkeypatch):
    def loop(positions_BT: Tensor, frequencies_K2: Tensor, dtype: torch.dtype) -> Tensor:
        parts = positions_BT.split(budget.TOKENS // 32, 1)
        return torch.cat([honest(part_BT, frequencies_K2, dtype) for part_BT in parts], 1)

    honest = plan.rotation
    monkeypatch.setattr(plan, "rotation", loop)
    case = budget.LayerCase()
    case(32, collect=False)
    assert case.prepared.launches.total() > budget_table.MOST_PREPARED + 100


def test_gathered_weights_are_not_cast(monkeypatch):
    counts = budget.gathered()
    assert counts.launches.total() <= budget_table.MOST_GATHERED and counts.launches["cat"] == 4, counts.launches
    honest = NativeGemm.joint
    monkeypatch.setattr(NativeGemm, "joint", lambda gemm, x, weights: honest(gemm, x, [w.float() for w in weights]))
    assert budget.gathered().launches.total() > budget_table.MOST_GATHERED, "the control"


@pytest.mark.parametrize(
    "how",
    [
        (DispatchMethod.all_to_all, 1),
        (DispatchMethod.all_to_all, 8),
        (DispatchMethod.all_to_all, 8, 4),
        (DispatchMethod.all_gather, 1),
    ],
)
def test_expert_parallelism_waits_once(monkeypatch, how):
    counts = budget.ep_counts(*how)
    assert counts.syncs == {"_to_copy": 1}, counts.launches
    if how == (DispatchMethod.all_to_all, 1):
        assert counts.launches.total() <= budget_table.MOST_EP, counts.launches

    def counting(*args: Any) -> Any:
        rows = honest(*args)
        rows.groups.counts_E.tolist()
        return rows

    honest = expert_parallel.permute_by_expert
    monkeypatch.setattr(expert_parallel, "permute_by_expert", counting)
    assert budget.ep_counts(*how).syncs["_to_copy"] > 1, "the control"


def test_a_second_cast_of_weights_exceeds_the_budget(monkeypatch):
    before = budget.LayerCase()(1)
    monkeypatch.setattr(WeightCopies, "narrow", lambda copies, w: w.to(copies.dtype))
    after = budget.LayerCase()(1)
    assert after[0].moved["_to_copy"] > budget_table.MOST_MOVED["_to_copy"]
    assert after[0].launches.total() > before[0].launches.total() + 3 and after[1] > 1.5 * before[1]


def test_a_token_keeps_few_bytes():
    for mode, (counts, kept) in budget.recomputed().items():
        assert kept <= budget_table.MOST_SAVED[mode]
        assert counts.launches.total() <= budget_table.MOST_RECOMPUTED[mode], counts.launches


def test_a_token_keeps_few_bytes_in_float8(monkeypatch):
    for mode, (counts, kept) in budget.recomputed(float8=True).items():
        assert kept <= budget_table.MOST_SAVED_FP8[mode]
        assert counts.syncs.total() == 1 + (mode == "full"), "experts' counts, read again when they are recomputed"
    monkeypatch.setattr(Shell, "restored", lambda shell, tensors: shell)
    assert budget.recomputed(float8=True)["full"][1] > 2 * budget_table.MOST_SAVED_FP8["full"], "the control"


def test_keeping_what_is_cheap_exceeds_the_budget(monkeypatch):
    monkeypatch.setattr("parallel.activation_checkpoint.Remade.wrap", lambda *args: None)
    assert budget.LayerCase(recompute=Recompute.selective)(1)[1] / budget.TOKENS > 100e3


def test_the_loss_never_holds_all_logits_and_launches_little(monkeypatch):
    whole, half = budget.loss_counts(), budget.loss_counts(2)
    assert max(whole.peak, half.peak) <= budget_table.MOST_LOSS
    for suffix, counts in (("", whole), ("_tp2", half)):
        assert counts.launches.total() <= budget_table.MOST_LOSS_LAUNCHES[suffix], counts.launches
    long = budget.loss_counts(tokens=16 * budget.TOKENS)
    assert long.launches.total() <= 16 * whole.launches.total(), "as the logits"
    with monkeypatch.context() as cast:
        cast.setattr(NativeGemm, "narrowed", lambda gemm, w: w.detach().to(gemm.compute_dtype))
        again = budget.loss_counts()
    weight_bytes = 2 * budget.SCOUT.vocab_size * budget.SCOUT.hidden_size
    assert again.peak > weight_bytes and again.launches.total() > budget_table.MOST_LOSS_LAUNCHES[""]
    monkeypatch.setattr("model.head._BLOCK_BYTES", 1 << 40)
    assert budget.loss_counts().peak > 1.5e9
    monkeypatch.setattr("model.head._BLOCK_BYTES", 8 << 20)
    assert budget.loss_counts().launches.total() > 1000


def test_a_step_waits_for_nothing_and_launches_by_weights(monkeypatch):
    case = StepCase(small())
    assert not case(64).syncs and case.parts["clip"]["_foreach_mul_"] == 1
    honest = case.engine.scale
    with monkeypatch.context() as wide:  # the slow way of a factor of another dtype
        wide.setattr("parallel.grad_norm.torch._foreach_mul_", lambda xs, x: [y.mul_(x) for y in xs])
        case(64)
    assert case.parts["clip"]["mul_"] == len(list(case.engine.placed.model.parameters()))
    monkeypatch.setattr(case.engine, "scale", lambda factor: honest(torch.full_like(factor, factor.item())))
    assert case(64).syncs.total() == 1, "the control"


def test_float8_calls_do_not_grow_with_experts():
    calls = {experts: budget.quantise_calls(replace(budget.SCOUT, num_experts=experts)) for experts in budget.EXPERTS}
    quantised = {experts: found.quantised for experts, found in calls.items()}
    assert quantised[8] == quantised[128] == {Operand.activation: 6, Operand.gradient: 6}
    assert calls[8].products == calls[128].products == 18


def test_an_input_quantised_for_each_layer_is_counted(monkeypatch):
    monkeypatch.setattr("model.layers._Projection.joins", False)
    assert budget.quantise_calls().quantised == {Operand.activation: 9, Operand.gradient: 9}


def test_weights_are_quantised_once_per_step():
    assert {budget.weight_quantise_calls(count) for count in budget.MICRO_BATCHES} == {6}


def test_weights_quantised_by_each_micro_batch_are_counted(monkeypatch):
    monkeypatch.setattr(QuantisedWeights, "owners", lambda *args: None)
    assert [budget.weight_quantise_calls(count) for count in budget.MICRO_BATCHES] == [12, 48]


def test_copies_that_make_the_host_wait_are_counted():
    x, host = torch.empty(3, device="meta"), torch.zeros(3)
    with Counter(values=lambda x: torch.full(x.shape, 7.0)) as counter:
        assert x.tolist() == [7, 7, 7]
        host.to("meta")
        x.copy_(host)
    assert counter.syncs == {"_to_copy": 2, "copy_": 1}
    with Counter() as counter:
        upload(host, x.device)
        x.to("meta", torch.float64)
        host.to(torch.float64)
        x[1] = x[0:1, None][0]
    assert not counter.syncs
    with Counter() as counter:
        host.to("meta", non_blocking=True)
        x.copy_(host, non_blocking=True)
        torch.tensor([1.0], device="meta")
        x[torch.tensor([1, 0])]
        x[[2]] = 1.0
        x[x > 0] = 1.0  # one value: filled
        x[x > 0] = x
        torch._foreach_mul_([x, x], torch.ones((), dtype=torch.float64, device="meta"))
        torch._foreach_mul_([x, x], torch.ones((), device="meta"))
    assert counter.launches["_foreach_mul_"] == 2 + 1, "the factor of another dtype is slow"
    assert counter.syncs == {"_to_copy": 1, "copy_": 1, "tensor": 1, "index": 1, "index by a list": 1, "index_put_": 1}


def test_the_counter_sees_what_a_gpu_would_do():
    x = torch.empty(4, 4, device="meta")
    with Counter() as counter:
        y = (x.view(16) + 1).view(4, 4).t()
        y.add_(1)
        torch.arange(3) + 1
        z = torch.sort(x)
        del z
    assert counter.moved == {"add": 2 * 64, "add_": 2 * 64, "sort": 64 + 64 + 128}
    assert counter.launches == {"add": 1, "add_": 1, "sort": 11} and not counter.syncs
    assert counter.live == 64 and counter.peak == 64 + 64 + 128


def test_the_command_writes_its_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.budget", "--json", str(tmp_path / "counts.json")])
    monkeypatch.setattr(budget, "report", lambda: {"launches": {"1": 3}, "syncs": 0})
    budget.main()
    assert json.loads((tmp_path / "counts.json").read_text()) == {"launches": {"1": 3}, "syncs": 0}
    assert 'launches: {"1": 3}' in capsys.readouterr().out


@pytest.mark.slow
def test_the_report_has_all_counts():
    found = budget.report()
    assert found["launches"].keys() == {"1", "8", "32"} and found["syncs"] == 0 and found["syncs_ep"] == 1
    assert found["saved_bytes"].keys() == {"none", "selective", "full"}
    assert found["quantise_calls"].keys() == {"8", "128"}
    assert found["syncs_fp8"]["none"] == 1 and "add_" in found["moved_bytes"]
    assert found["step_syncs"] == 0 and found["step_launches"].keys() == {"clip", "optimizer", "balancer"}
    assert found["loss_peak_bytes"] and found["loss_launches"]
