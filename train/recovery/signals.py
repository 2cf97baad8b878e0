"""The values of a step that detectors watch, read from the device without a wait of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from train.metrics import StepMetrics

LOSS, NORM = "loss", "gradient_norm"
ROUTER = ("router_z", "router_load", "router_concentration")
"""The largest over the MoE layers of: the z-loss; the load of the busiest expert, over the mean; and how far the
entropy of the router's scores is below its maximum, from 0 (even) to 1 (one expert).
"""


def signals(metrics: StepMetrics) -> dict[str, Tensor]:
    """Return the signals of a step: scalars on the device, equal on every rank."""
    found = {LOSS: metrics.loss, NORM: metrics.gradient_norm}
    if metrics.balance:
        counts_LE = metrics.balance["counts"].double()
        load = (counts_LE.amax(1) / counts_LE.mean(1).clamp_min(1e-9)).amax()
        values = metrics.balance["z"].amax(), load, 1 - metrics.balance["entropy"].amin()
        found |= dict(zip(ROUTER, values, strict=True))
    return found


class SignalReader:
    """Keeps the signals of steps on the device until they are read. On a CPU, they can be read after every step. On a
    GPU, read them at steps that wait for the device anyway.
    """

    def __init__(self) -> None:
        self._names: dict[int, list[str]] = {}
        self._values: list[Tensor] = []

    def add(self, steps: int, metrics: StepMetrics) -> None:
        """Keep the signals of step number `steps`, counted from 1."""
        found = signals(metrics)
        self._names[steps] = list(found)
        self._values += [value.double() for value in found.values()]

    def read(self) -> dict[int, dict[str, float]]:
        """Return the signals of the steps since the last call, with one copy from the device."""
        values = iter(torch.stack(self._values).tolist() if self._values else [])
        found = {steps: {name: next(values) for name in names} for steps, names in self._names.items()}
        self.forget()
        return found

    def forget(self) -> None:
        """Drop the steps that have not been read."""
        self._names, self._values = {}, []
