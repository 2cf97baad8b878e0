"""Constants of the planner: efficiencies of kernels and links, host time, and what frameworks keep in memory.

Each has a physical meaning and one value for all rows. They are fitted by `python -m bench.plan.fit` on the sources
that `bench/plan/split.json` names, and stored in calibration.json beside this module.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from launch.plan.workload import Job, LossKernel

FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Calibration:
    """Defaults are values from the literature; calibration.json has the fitted ones."""

    # Kernels: share of the dense peak that large products reach, by GPU generation and dtype
    product_ampere: float = 0.80
    product_hopper: float = 0.72
    product_hopper_fp8: float = 0.55
    product_blackwell: float = 0.75
    product_blackwell_fp8: float = 0.60
    product_blackwell_fp4: float = 0.45
    power_exponent: float = 0.7
    """How the rate of products follows the power limit."""
    product_tile: float = 150.0
    """Rows at which a product of narrow shape reaches half its rate, on an H100 in bf16."""
    group_tile: float = 150.0
    """The same for the rows of an expert in a grouped product."""
    attention_ampere: float = 0.50
    attention_hopper: float = 0.50
    attention_blackwell: float = 0.50
    """Share of the bf16 peak in flash attention's forward pass. The backward pass has 2.5 times its FLOPs."""
    attention_triton: float = 0.5
    """Rate of the Triton kernel that llm-foundry ran in 2023, relative to kernels made for the GPU's generation."""
    attention_second: float = 0.7
    """Rate of FlashAttention 2, relative to kernels made for the GPU's generation."""
    stream: float = 0.70
    """Share of the memory's bandwidth in elementwise kernels."""
    elementwise: float = 1.0
    """Elementwise traffic relative to fused kernels."""
    elementwise_unfused: float = 1.4
    """The same for frameworks without fused kernels: nanotron, DeepSpeed, FSDP without compilation."""
    moe_traffic: float = 12.0
    """Bytes per routed token and hidden element that routing, permutation and combination move, both passes."""
    moe_yearly: float = 1.25
    """By which factor the MoE layers' overheads fell per year of software."""
    moe_fused: float = 0.6
    """The same traffic with the kernels and whole-step graphs of 2026, relative to before."""
    quantise: float = 1.0
    """Traffic of quantisation relative to reading 2 bytes and writing 1."""
    quantise_expert: float = 2.0
    """The same for the many small tensors of experts, relative to a dense layer's."""

    # Links: share of the data sheet's bandwidth; seconds per message
    nvlink: float = 0.75
    network: float = 0.75
    network_nanotron: float = 0.3
    """The same in the cluster of the sweep."""
    network_nanotron_wide: float = 0.5
    """Relative to that, between more than 32 nodes."""
    all_to_all_nvlink: float = 0.65
    """Not fitted: 325 of 450 GB/s on H100, 497 of 900 on GB200 (2603.07685, table 7)."""
    all_to_all_network: float = 0.88
    """Not fitted: 44 of 50 GB/s (2603.07685, table 7)."""
    latency_s: float = 8e-6
    network_latency_s: float = 4e-5
    tp_exposed: float = 0.7
    ep_exposed: float = 0.9
    ep_exposed_overlapped: float = 0.4
    cp_exposed: float = 0.5
    dp_hidden: float = 0.6
    """Share of a micro-batch's backward pass under which gradients are reduced."""
    fsdp_exposed: float = 0.15

    # Host
    host_layer_s: float = 1e-3
    """Seconds of the host per dense layer and micro-batch, both passes, in Megatron."""
    host_moe_s: float = 5e-3
    """More seconds for a MoE layer: it waits for the counts of tokens, and launches a kernel for each step."""
    host_quantised: float = 1.3
    """Launches with quantisation, relative to without."""
    host_nanotron_s: float = 2.5e-3
    host_nanotron_tp_s: float = 2e-3
    host_step_s: float = 0.03
    host_nanotron_step_s: float = 0.1
    send_s: float = 5e-5
    nanotron_dp_hidden: float = 0.9
    nanotron_sharded: float = 1.3
    """Time of ZeRO-1's reduction and gathering per tensor, relative to one all-reduce at the same bandwidth."""
    nanotron_send_s: float = 3e-3
    slow_batch_s: float = 1.4
    """Seconds that a micro-batch took longer in nanotron's pipelines before a fix. The cause was not published, and
    sizes and stages do not matter.
    """

    # Memory
    imbalance: float = 1.4
    """Routed tokens of the fullest rank over the mean, at the start of training without forced balance."""
    base_mib: float = 32.0
    nanotron_base_mib: float = 72.0
    """Not fitted: what the smallest trials keep beside their state."""
    nanotron_hidden_bytes: float = 30.7
    nanotron_ffn_bytes: float = 5.1
    nanotron_logit_bytes: float = 15.7
    nanotron_gathered_bytes: float = 4.2
    nanotron_layer_bytes: float = 17.0
    nanotron_bucket_bytes: float = 2.6
    usable: float = 0.92
    """Share of a GPU's memory that a job can allocate before fragmentation and communicators fill it."""

    def logit_bytes(self, job: Job) -> float:
        """Bytes per logit at the loss's peak. Plain: bf16 logits and their fp32 copy."""
        return {LossKernel.plain: 6.0, LossKernel.compiled: 10.0, LossKernel.fused: 4.0, LossKernel.chunked: 0.5}[
            job.loss
        ]


@cache
def default_calibration() -> Calibration:
    """Return the calibration that ships with the planner."""
    return read_calibration(FILE) if FILE.exists() else Calibration()


def read_calibration(path: Path) -> Calibration:
    """Return a stored calibration. Raises `ConfigError` for an unknown constant, or one that is not positive."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())["constants"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("calibration", str(path), "holds no calibration") from error
    known = {one.name for one in dataclasses.fields(Calibration)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError("calibration", name, "no such constant", sorted(known)[:5])
        if not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ConfigError("calibration", name, "must be a number, at least 0")
    return Calibration(**values)
