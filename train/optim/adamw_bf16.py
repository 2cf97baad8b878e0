"""AdamW that stores both moments in bfloat16 and computes in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from parallel.sharding import local


def fresh_state(parameter: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the initial state of a parameter, all zeros. `dtype`: the dtype of the moments (None: the parameter's)."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


class AdamWBF16(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with decoupled weight decay."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self.state:
                    self.state[parameter] = fresh_state(parameter, torch.bfloat16)
                self._update(local(parameter), local(parameter.grad), self.state[parameter], group)

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state["step"] += 1
        first = local(state["exp_avg"]).to(grad.dtype).lerp_(grad, 1 - beta1)
        second = local(state["exp_avg_sq"]).to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        local(state["exp_avg"]).copy_(first)
        local(state["exp_avg_sq"]).copy_(second)
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (second / correction2).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(first.div_(denominator).mul_(group["lr"] / correction1))
