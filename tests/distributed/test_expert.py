"""Dispatchers: padding for grouped matmuls, ranks that get no tokens, each against one device, and bytes that travel."""

from __future__ import annotations

import importlib.util
import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from launch.rank_pool import RankError
from model.attention.plan import ForwardContext
from model.config import BalanceConfig, ModelConfig, RouterConfig, Score, WeightsOn
from model.init import initialise
from model.kernels import TorchKernels
from model.moe import LocalDispatcher, MixtureOfExperts, permute_by_expert
from parallel import cost
from parallel.comm.world import connect
from parallel.expert_parallel import AllGather, AllToAll, DeepEP
from parallel.layout import ParallelConfig
from parallel.mesh import Meshes
from precision.gemm import Groups
from precision.native_gemm import NativeGemm
from precision.resolve import LayerGemms
from tests.support.bugs import planted
from tests.support.fakes.deep_ep_buffer import SIGNATURES, Buffer
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


def config_of(top_k: int, weights_on: WeightsOn, experts: int = E, force_balanced: bool = False) -> ModelConfig:
    router = RouterConfig(
        top_k=top_k,
        weights_on=weights_on,
        score=Score.softmax,
        norm_topk_prob=top_k > 1,
        force_balanced=force_balanced,
    )
    sizes = {"hidden_size": D, "num_layers": 1, "num_experts": experts, "expert_hidden_size": F}
    return ModelConfig(**sizes, shared_expert_hidden_size=0, router=router, balance=BalanceConfig())


def make(gemm: NativeGemm, *how: Any) -> MixtureOfExperts:
    config = config_of(*how)
    moe = MixtureOfExperts(config, LayerGemms(gemm)).double()
    initialise(moe, config, seed=1)
    return moe


def tokens(rank: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def split(meshes: Meshes, moe: MixtureOfExperts, kind: Any, node_size: int | None = None) -> tuple[slice, slice]:
    """Leave this rank's experts in a layer. Return which they are, and which part of their hidden size."""
    etp, local, size = meshes.etp.size, moe.dispatch.experts // meshes.ep.size, F // meshes.etp.size
    experts = slice(meshes.ep.rank * local, (meshes.ep.rank + 1) * local)
    columns = slice(meshes.etp.rank * size, (meshes.etp.rank + 1) * size)
    with torch.no_grad():
        gate_up, down = moe.experts.gate_up, moe.experts.down
        gate_up.weight = torch.nn.Parameter(gate_up.weight[experts, :, columns].clone())
        down.weight = torch.nn.Parameter(down.weight[experts, :, columns].clone())
    weights_on, multiple = moe.dispatch.weights_on, moe.experts.token_multiple
    buffer = lambda token_bytes: Buffer(meshes.experts.group)  # noqa: E731
    moe.dispatch = kind(meshes.experts, etp, local, weights_on, multiple, TorchKernels(), buffer, node_size)
    return experts, columns


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
    node_size: int | None = None

    def model(self, gemm: NativeGemm) -> MixtureOfExperts:
        moe = make(gemm, self.top_k, self.weights_on)
        if self.skew:  # a token prefers expert 0 or all others equally: some experts get no token
            moe.router.weight.data[1:] = -moe.router.weight.data[:1]
        return moe


def dispatched(bug: str | None, etp: int, gemm: NativeGemm, cases: list[Case]) -> Any:
    """Send this rank's tokens through the experts of all ranks. Return the output and gradients of each case."""
    meshes = meshes_here(ParallelConfig(ep=connect().size // etp, etp=etp))
    with planted(bug):
        found = []
        for case in cases:
            moe = case.model(gemm)
            experts, columns = split(meshes, moe, case.kind, case.node_size)
            found.append(figures(moe, tokens(meshes.world.rank)))
    return found, experts, columns


def assert_as_one_device(
    ranks: Any, count: int, etp: int, cases: list[Case], bug: str | None = None, rtol: float = 1e-10
) -> None:
    """Compare outputs, and gradients of tokens, experts and router, in float64."""
    near = {"rtol": rtol, "atol": rtol / 100}
    ranked = ranks(count, dispatched, bug, etp, Padded(torch.float64), cases)
    for place, case in enumerate(cases):
        alone = case.model(NativeGemm(torch.float64))
        assert isinstance(alone.dispatch, LocalDispatcher)
        wanted = [figures(alone, tokens(rank)) for rank in range(count)]  # gradients add up in `alone`
        routers = sum(found[place].get("router.weight", torch.zeros(())) for found, *_ in ranked)
        torch.testing.assert_close(routers, wanted[-1]["router.weight"], **near, msg=f"{case}: router")
        for rank, (found, experts, columns) in enumerate(ranked):
            parts = {name: wanted[rank][name] for name in ("y", "x")}
            for name in ("experts.gate_up.weight", "experts.down.weight"):
                parts[name] = wanted[-1][name][experts, :, columns]
            for name, part in parts.items():
                torch.testing.assert_close(found[place][name], part, **near, msg=f"{case}: {name}")


ROUTINGS = [(1, WeightsOn.input), (1, WeightsOn.output), (2, WeightsOn.output), (3, WeightsOn.input)]
CASES = [Case(kind, *how, skew) for kind in (AllToAll, AllGather) for how in ROUTINGS for skew in (False, True)]


@pytest.mark.parametrize("count, etp", [(2, 1), (4, 1), (2, 2), (4, 2)], ids=["ep2", "ep4", "etp2", "ep2-etp2"])
def test_a_dispatcher_computes_what_one_device_does(ranks, count, etp):
    assert_as_one_device(ranks, count, etp, CASES)


SKEWED = [Case(AllToAll, 2, WeightsOn.output, True)]
"""Tokens choose the first expert or none of the last rank's."""


@pytest.mark.parametrize("count, etp", [(4, 1), (4, 2)], ids=["ep4", "ep2-etp2"])
def test_an_exchange_by_node_computes_what_one_device_does(ranks, count, etp):
    assert_as_one_device(ranks, count, etp, [case._replace(node_size=2) for case in CASES if case.kind is AllToAll])


DEEPEP = [Case(DeepEP, *how, skew) for how in ROUTINGS for skew in (False, True)]


def test_deepep_computes_what_one_device_does(ranks):
    """Use a stand-in on gloo, whose results are NaN until their event is waited for. Weights travel in float32."""
    assert_as_one_device(ranks, 2, 1, DEEPEP, rtol=1e-5)


@pytest.mark.parametrize("bug", ["event_not_waited_for", "counts_of_deepep_not_aligned"])
def test_a_bug_beside_deepep_is_noticed(ranks, bug):
    with pytest.raises((AssertionError, RankError)):
        assert_as_one_device(ranks, 2, 1, DEEPEP[-1:], bug, rtol=1e-5)


def test_the_stand_in_has_deepeps_signatures():
    """Also compare with DeepEP itself where it is installed."""
    assert {name: str(inspect.signature(getattr(Buffer, name))) for name in SIGNATURES} == SIGNATURES
    if importlib.util.find_spec("deep_ep") is not None:
        import deep_ep

        for name in SIGNATURES:
            theirs = inspect.signature(getattr(deep_ep.Buffer, name))
            ours = inspect.signature(getattr(Buffer, name))
            assert [*theirs.parameters][: len(ours.parameters)] == [*ours.parameters], name


BUGS = {
    "token_sent_twice": 2,  # a rank has several experts
    "weights_on_the_wrong_side": 2,
    "weights_without_gradient": 2,
    "sums_lost_beside_an_idle_rank": 4,
}
"""Ranks on which a planted bug shows."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_the_exchange_is_noticed(ranks, bug):
    with pytest.raises(AssertionError):
        assert_as_one_device(ranks, BUGS[bug], 1, SKEWED, bug)


MANY, TOP = 16, 8


def exchanged(force_balanced: bool, once: bool, node_size: int | None = None) -> Any:
    """Return the bytes that this rank hands to the exchange of tokens (between nodes, if it is by node), and the ids
    that its tokens choose.
    """
    meshes, ids = meshes_here(ParallelConfig(ep=connect().size)), []
    moe = make(NativeGemm(torch.float64), TOP, WeightsOn.output, MANY, force_balanced)
    moe.router.register_forward_hook(lambda module, inputs, outputs: ids.extend(outputs[0].flatten(0, 1).tolist()))
    split(meshes, moe, AllToAll, node_size)
    meshes.traffic.take()
    with planted(None if once else "token_sent_once_per_expert"):
        figures(moe, tokens(meshes.world.rank))
    return meshes.traffic.take()["experts", "tokens"], ids


@pytest.mark.parametrize("force_balanced", [True, False])
def test_a_token_travels_once_to_each_rank(ranks, force_balanced):
    """With 8 of 16 experts on 4 ranks. Balanced routing takes experts 0 to 7 or 8 to 15, which are on two ranks."""
    held = MANY // 4
    found, apart = (ranks(4, exchanged, force_balanced, once) for once in (True, False))
    copies = [len({expert // held for expert in chosen}) for _, ids in found for chosen in ids]
    token, ways = D * 8, 4  # there and back, forward and backward
    assert sum(size for size, _ in found) == ways * sum(copies) * token
    assert sum(size for size, _ in apart) == ways * 4 * T * TOP * token, "the control"
    assert not force_balanced or set(copies) == {2}
    config = config_of(TOP, WeightsOn.output, MANY)
    missed = math.comb(MANY - held, TOP) / math.comb(MANY, TOP)
    assert cost.copies_per_token(config, ParallelConfig(ep=4).resolve(4)).ranks == pytest.approx(4 * (1 - missed))


def test_a_token_crosses_the_network_once_to_each_node(ranks):
    near = MANY // 2
    found = ranks(4, exchanged, False, True, 2)
    nodes = [len({expert // near for expert in chosen}) for _, ids in found for chosen in ids]
    assert sum(size for size, _ in found) == 4 * sum(nodes) * D * 8
    assert sum(size for size, _ in ranks(4, exchanged, False, True)) > 1.5 * 4 * sum(nodes) * D * 8, "the control"
