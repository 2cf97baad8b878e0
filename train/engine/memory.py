"""Reject a run that cannot fit into memory, by arithmetic, before anything is allocated."""

from __future__ import annotations

import torch

from core.errors import ConfigError
from core.memory import available_memory
from parallel.comm.world import ranks_on_machine
from parallel.layout import Layout
from train.config import TrainConfig, phases, run_parameters
from train.contrastive.towers import num_parameters
from train.optim.config import OptimizerKind

GIB = 2**30


def check_memory(config: TrainConfig, layout: Layout, device: torch.device) -> None:
    """Raise `ConfigError` if a rank needs more memory than it can have.

    Counts a lower bound, so that no possible run is rejected: weights, gradients and optimizer state divided over all
    ranks of a replica, one layer's hidden states of a micro-batch, and the tokens of a batch.
    """
    here = ranks_on_machine()
    if device.type == "cuda":
        have, where = torch.cuda.get_device_properties(device).total_memory, "the GPU has"
    else:
        have, where = available_memory() // here, f"this machine has for each of its {here} ranks"
    parameters, frozen = num_parameters(config), _frozen_parameters(config)
    state = (parameters - frozen) * _bytes_per_parameter(config) + frozen * config.precision.master_dtype.itemsize
    state = state * layout.dp_replicate // layout.world_size
    for phase in phases(config):
        tokens = phase.micro_batch_size * phase.seq_len // layout.cp
        hidden = tokens * config.model.hidden_size * config.precision.compute_dtype.itemsize
        batch = phase.global_batch_size // layout.dp * phase.seq_len * 8
        for key, need, what in (
            ("model", state, f"{parameters / 1e9:,.2f} billion parameters with gradients and optimizer state need"),
            (f"{phase.key}.micro_batch_size", state + hidden, "with one layer's hidden states a micro-batch needs"),
            (f"{phase.key}.global_batch_size", state + batch, "with a batch of token ids a rank needs"),
        ):
            if need > have:
                advice = "use fewer, or more ranks" if key != "model" else "use a smaller model, or more ranks"
                reason = f"{what} {need / GIB:,.1f} GiB a rank, and {where} {have / GIB:,.1f} GiB: {advice}"
                raise ConfigError(key, None, reason)


def _frozen_parameters(config: TrainConfig) -> int:
    frozen = config.training.frozen
    infos = run_parameters(config).values() if frozen else ()
    return sum(info.shape.numel() for info in infos if info.role in frozen)


def _bytes_per_parameter(config: TrainConfig) -> int:
    """Return the bytes of a trained parameter with its gradient and moments; the optimizer's state may be elsewhere."""
    moments = config.optimizer.moments_dtype(config.precision)
    held = 0 if moments is None else moments.itemsize * (1 if config.optimizer.kind is OptimizerKind.muon else 2)
    if config.parallel.zero.offload.name != "none":
        return config.precision.compute_dtype.itemsize
    return 2 * config.precision.master_dtype.itemsize + held
