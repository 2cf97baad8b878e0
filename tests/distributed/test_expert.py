"""Dispatchers: padding for grouped matmuls, ranks that get no tokens, and each dispatcher against one device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.attention.plan import ForwardContext
from model.config import BalanceConfig, ModelConfig, RouterConfig, Score, WeightsOn
from model.init import initialise
from model.kernels import TorchKernels
from model.moe import LocalDispatcher, MixtureOfExperts, permute_by_expert
from parallel.comm.world import connect
from parallel.expert_parallel import AllGather, AllToAll
from parallel.layout import ParallelConfig
from precision.gemm import Groups
from precision.native_gemm import NativeGemm
from precision.resolve import LayerGemms
from tests.support.models import meshes_here

T, D, E, F = 24, 16, 4, 8


class Padded(NativeGemm):
    """Require a multiple of 8 rows for each expert, and fill the rows after the last expert's with NaN."""

    token_multiple = 8

    def linear(self, x_CD: Tensor, w_EFD: Tensor, groups: Groups | None = None) -> Tensor:
        if groups is None:
            return super().linear(x_CD, w_EFD)
        assert not (groups.counts_E % self.token_multiple).any(), groups.counts_E
        assert groups.host == groups.counts_E.tolist()  # a dispatcher may give the counts as `known`
        used = sum(groups.host)
        y = super().linear(x_CD[:used], w_EFD, groups)
        return torch.cat([y, y.new_full((x_CD.shape[0] - used, y.shape[1]), torch.nan)])


def figures(moe: MixtureOfExperts, x_TD: Tensor, seed: int = 3) -> dict[str, Tensor]:
    x = x_TD[None].clone().requires_grad_()
    y = moe(x, ForwardContext(torch.arange(x.shape[1])[None]))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach()[0], "x": x.grad[0]}
    return found | {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}


def make(gemm: NativeGemm, top_k: int, weights_on: WeightsOn) -> MixtureOfExperts:
    router = RouterConfig(top_k=top_k, weights_on=weights_on, score=Score.softmax, norm_topk_prob=top_k > 1)
    sizes = {"hidden_size": D, "num_layers": 1, "num_experts": E, "expert_hidden_size": F}
    config = ModelConfig(**sizes, shared_expert_hidden_size=0, router=router, balance=BalanceConfig())
    moe = MixtureOfExperts(config, LayerGemms(gemm)).double()
    initialise(moe, config, seed=1)
    return moe


def tokens(rank: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


@pytest.mark.parametrize("weights_on", WeightsOn)
@pytest.mark.parametrize("top_k", [1, 2])
def test_padding_changes_nothing(top_k, weights_on):
    plain = figures(make(NativeGemm(torch.float64), top_k, weights_on), tokens())
    padded = figures(make(Padded(torch.float64), top_k, weights_on), tokens())
    assert plain.keys() == padded.keys() and len(plain) == 5
    for name, wanted in plain.items():
        torch.testing.assert_close(padded[name], wanted, rtol=1e-12, atol=1e-14, msg=name)


def test_rows_are_sorted_stably_and_padded():
    rows = permute_by_expert(torch.tensor([[2], [0], [2], [0], [2]]), experts=4, multiple=2)
    assert rows.groups.host == [2, 0, 4, 0]
    assert rows.source_C[:2].tolist() == [1, 3] and rows.source_C[2:5].tolist() == [0, 2, 4]
    assert rows.is_padding_C1 is not None and rows.is_padding_C1[:, 0].tolist()[:6] == [False] * 5 + [True]


class Case(NamedTuple):
    kind: Any
    top_k: int
    weights_on: WeightsOn
    skew: bool

    def model(self, gemm: NativeGemm) -> MixtureOfExperts:
        moe = make(gemm, self.top_k, self.weights_on)
        if self.skew:  # a token prefers expert 0 or all others equally: some experts get no token
            moe.router.weight.data[1:] = -moe.router.weight.data[:1]
        return moe


def dispatched(etp: int, gemm: NativeGemm, cases: list[Case]) -> Any:
    """Send this rank's tokens through the experts of all ranks. Return the output and gradients of each case."""
    found, ep = [], connect().size // etp
    meshes = meshes_here(ParallelConfig(ep=ep, etp=etp))
    local, size = E // ep, F // etp
    experts = slice(meshes.ep.rank * local, (meshes.ep.rank + 1) * local)
    columns = slice(meshes.etp.rank * size, (meshes.etp.rank + 1) * size)
    for case in cases:
        moe = case.model(gemm)
        with torch.no_grad():
            gate_up, down = moe.experts.gate_up, moe.experts.down
            gate_up.weight = torch.nn.Parameter(gate_up.weight[experts, :, columns].clone())
            down.weight = torch.nn.Parameter(down.weight[experts, :, columns].clone())
        moe.dispatch = case.kind(meshes.experts, etp, local, case.weights_on, gemm.token_multiple, TorchKernels())
        found.append(figures(moe, tokens(meshes.world.rank)))
    return found, experts, columns


ROUTINGS = [(1, WeightsOn.input), (2, WeightsOn.output)]
PLAIN = [Case(kind, *how, skew) for kind in (AllToAll, AllGather) for how in ROUTINGS for skew in (False, True)]


@pytest.mark.parametrize("count, etp", [(2, 1), (4, 1), (2, 2), (4, 2)], ids=["ep2", "ep4", "etp2", "ep2-etp2"])
def test_a_dispatcher_computes_what_one_device_does(ranks, count, etp):
    cases = [*PLAIN, *(Case(kind, 2, WeightsOn.input, True) for kind in (AllToAll, AllGather))]
    ranked = ranks(count, dispatched, etp, Padded(torch.float64), cases)
    for place, case in enumerate(cases):
        alone = case.model(NativeGemm(torch.float64))
        assert isinstance(alone.dispatch, LocalDispatcher)
        wanted = [figures(alone, tokens(rank)) for rank in range(count)]  # gradients add up in `alone`
        for rank, (found, experts, columns) in enumerate(ranked):
            parts = {name: wanted[rank][name] for name in ("y", "x")}
            for name in ("experts.gate_up.weight", "experts.down.weight"):
                parts[name] = wanted[-1][name][experts, :, columns]
            for name, part in parts.items():
                torch.testing.assert_close(found[place][name], part, rtol=1e-10, atol=1e-12, msg=f"{case}: {name}")
