"""Gradient injection gives the gradients of an ordinary balancing loss, and it evens the load."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import AuxScope, BalanceConfig, RouterConfig, Score
from model.load_balance import Balancer, RouterBalance, RouterSums
from model.moe import Router
from tests.support.models import build, small

B, T, D, E = 3, 10, 16, 4


def plain_scores(logits: torch.Tensor, score: Score) -> torch.Tensor:
    return logits.softmax(-1) if score is Score.softmax else logits.sigmoid()


def ordinary_loss(x: torch.Tensor, weight: torch.Tensor, router: RouterConfig, balance: BalanceConfig, divisor: float):
    """Return the balancing terms as a loss, and their unscaled sums. Scope `whole` uses the load of the last step."""
    logits = x @ weight.T
    chosen = logits.topk(router.top_k, -1).indices
    p = plain_scores(logits, router.score)
    p = p / p.sum(-1, keepdim=True)
    load = torch.nn.functional.one_hot(chosen, E).double().sum(2)  # B, T, E
    tokens = 1 if balance.aux_scope is AuxScope.sequence else (0, 1)
    share = load.mean(tokens, keepdim=True) * E / router.top_k
    if balance.aux_scope is AuxScope.whole:
        share = torch.tensor([9, 1, 1, 1]).double() / 3
    aux = (share * p).sum() / divisor
    z = logits.logsumexp(-1).square().sum() / divisor
    entropy = -(p * p.log()).sum() / divisor / math.log(E)
    return balance.aux * aux + balance.z * z, torch.stack(RouterSums(aux=aux, z=z, entropy=entropy))


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("scope", AuxScope)
@pytest.mark.parametrize("top_k", [1, 2])
def test_injected_gradients_equal_an_ordinary_loss(score, scope, top_k):
    torch.manual_seed(0)
    config, balance = RouterConfig(top_k=top_k, score=score), BalanceConfig(aux=0.3, aux_scope=scope, z=0.2)
    router = Router(D, E, config, balance).double()
    torch.nn.init.normal_(router.weight)
    router.balance.step(torch.tensor([9, 1, 1, 1]))
    x = torch.randn(B, T, D, dtype=torch.float64)
    experts_BTK, weights_BTK = router(x, routed_tokens=77.0)
    factor = torch.randn_like(weights_BTK)
    (weights_BTK * factor).sum().backward()

    weight = router.weight.detach().clone().requires_grad_()
    plain = (plain_scores(x @ weight.T, score).gather(-1, experts_BTK) * factor).sum()
    (alone,) = torch.autograd.grad(plain, weight, retain_graph=True)
    loss, sums = ordinary_loss(x, weight, config, balance, 77.0)
    (wanted,) = torch.autograd.grad(plain + loss, weight)
    torch.testing.assert_close(router.weight.grad, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(router.balance.sums, sums.detach(), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(router.weight.grad, alone), "control: without the terms the gradient differs"


def test_evaluation_counts_nothing_and_training_needs_a_count():
    model, tokens = build(small(balance=BalanceConfig(aux=0.1))), torch.zeros(B, T, dtype=torch.int64)
    with torch.no_grad():
        model(tokens)
    assert int(Balancer(model).step()["counts"].sum()) == 0
    with pytest.raises(ValueError, match="routed_tokens"):
        model(tokens)


def test_bias_moves_against_the_load_with_zero_mean():
    balance = RouterBalance(E, RouterConfig(), BalanceConfig(bias_rate=0.1))
    balance.step(torch.tensor([10, 2, 4, 4]))
    assert balance.bias_E.tolist() == pytest.approx([-0.15, 0.05, 0.05, 0.05])
    assert balance.load_E.tolist() == pytest.approx([2.0, 0.4, 0.8, 0.8])


@pytest.mark.parametrize("balance", [BalanceConfig(bias_rate=0.02), BalanceConfig(aux=0.1)], ids=["bias", "aux"])
def test_balancing_evens_a_skewed_router(balance):
    def skew(config: BalanceConfig) -> float:
        torch.manual_seed(0)
        router = Router(D, E, RouterConfig(), config)
        torch.nn.init.normal_(router.weight, std=0.1)
        offset = torch.ones(D)
        optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
        with torch.no_grad():
            router.weight[0] += 0.2  # every token prefers expert 0
        for _ in range(60):
            x = torch.randn(B, 64, D) + offset
            router(x, float(B * 64))[1].sum().mul(0).backward()
            optimizer.step()
            optimizer.zero_grad()
            counts = router.balance.counts_E.clone()
            router.balance.step(counts)
        return float(counts.max() / counts.double().mean())

    assert skew(BalanceConfig()) > 3.0, "control: without balancing it stays skewed"
    assert skew(balance) < 1.8


def test_forced_balance_spreads_tokens_evenly():
    router = Router(D, E, RouterConfig(top_k=2, force_balanced=True), BalanceConfig())
    torch.nn.init.ones_(router.weight)
    experts_BTK, _ = router(torch.randn(2, 10, D), None)
    assert torch.bincount(experts_BTK.flatten(), minlength=E).tolist() == [10] * E
    assert all(len(set(row)) == 2 for row in experts_BTK.flatten(0, 1).tolist())
