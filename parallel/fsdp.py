"""Sharded data parallelism with FSDP2: parameters, gradients and optimizer state live as shards.

Losses are sums over tokens divided by global counts, so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.moe import MixtureOfExperts
from model.transformer import Transformer
from precision.backend import PrecisionConfig


def apply(model: Transformer, mesh: DeviceMesh | None, precision: PrecisionConfig) -> None:
    """Shard each layer, then what is left. Without a mesh the model stays as it is.

    In bfloat16 the gathered copies are bf16 and gradients are reduced in fp32. Routers are gathered in the master
    format: they score in fp32 on one device and must not be rounded first on many.
    """
    if mesh is None:
        return
    master = MixedPrecisionPolicy()
    narrow = precision.compute_dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(precision.compute_dtype, precision.master_dtype) if narrow else master
    for layer in model.layers:
        if narrow and isinstance(layer.ffn, MixtureOfExperts):
            fully_shard(layer.ffn.router, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM, which a factor alone would use
