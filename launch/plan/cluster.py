"""GPUs and their links: published peaks, from vendors' data sheets. Efficiencies are in `launch.plan.calibration`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from enum import Enum

from core.errors import ConfigError, check_numbers, divisors


class Generation(Enum):
    ampere = "ampere"
    hopper = "hopper"
    blackwell = "blackwell"


@dataclass(frozen=True)
class Gpu:
    """One GPU in the machine that it is usually sold in.

    Rates are dense peaks in TFLOP/s; 0 where the GPU has no such format. Bandwidths are GB/s per GPU and direction.
    `domain`: GPUs that NVLink connects. `host`: seconds of single-thread work, relative to an H100's host.
    """

    name: str
    generation: Generation
    memory_gib: float
    bf16: float
    fp8: float
    fp4: float
    hbm: float
    nvlink: float
    network: float
    domain: int = 8
    per_node: int = 8
    host: float = 1.0
    power: float = 1.0
    """Power limit relative to the generation's reference (400 W, 700 W, 1,200 W), which sustained clocks follow."""

    def peak(self, precision: str) -> float:
        """Return the dense peak of a precision's products in FLOP/s. A format that the GPU lacks runs in bf16."""
        if precision == "fp32":
            return self.bf16 * 1e12 / 2
        rate = {"nvfp4": self.fp4, "fp8": self.fp8, "mxfp8": self.fp8}.get(precision) or self.bf16
        return rate * 1e12


_A, _H, _B = Generation.ampere, Generation.hopper, Generation.blackwell
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40G", _A, 39.4, 312, 0, 0, 1555, 300, 25, host=1.3),
        Gpu("A100-80G", _A, 79.2, 312, 0, 0, 2039, 300, 25, host=1.3),
        Gpu("A800", _A, 79.2, 312, 0, 0, 2039, 200, 25, host=1.3),
        Gpu("H100", _H, 79.1, 989.5, 1979, 0, 3352, 450, 50),
        Gpu("H100-96G", _H, 94.0, 989.5, 1979, 0, 2400, 450, 50, power=0.71),
        Gpu("H800", _H, 79.1, 989.5, 1979, 0, 3352, 200, 50),
        Gpu("H20", _H, 95.0, 148, 296, 0, 4000, 450, 50),
        Gpu("H200", _H, 139.8, 989.5, 1979, 0, 4800, 450, 50),
        Gpu("GH200", _H, 94.0, 989.5, 1979, 0, 4000, 450, 50, domain=4, per_node=4),
        Gpu("B200", _B, 178.4, 2250, 4500, 9000, 8000, 900, 50, power=0.83),
        Gpu("B300", _B, 268.0, 2250, 4500, 13500, 8000, 900, 100, power=0.92),
        Gpu("GB200", _B, 184.0, 2500, 5000, 10000, 8000, 900, 50, domain=72, per_node=4, host=1.1),
        Gpu("GB300", _B, 277.0, 2500, 5000, 15000, 8000, 900, 100, domain=72, per_node=4, host=1.1, power=1.17),
    )
}
_ALIASES = {"A100": "A100-80G", "H100-80G": "H100", "H100-NVL": "H100-96G", "H800-80G": "H800", "A800-80G": "A800"}


def find_gpu(name: str, notes: str = "") -> Gpu:
    """Return the GPU that a table calls `name`. Raises `ConfigError` for an unknown one."""
    key = re.sub(r"[\s_]+", "-", name.strip().upper())
    key = re.sub(r"^(NVIDIA-|DGX-)+|-?(SXM\d?|HBM\d?E?|PCIE|TENSOR-CORE|NVL72|GPU)$", "", key)
    key = re.sub(r"(\d+)GB$", r"\1G", key).strip("-")
    key = _ALIASES.get(key, key)
    if key == "H100" and re.search(r"500 ?W|96 ?G", notes):
        key = "H100-96G"
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=3, cutoff=0.3) or list(GPUS)
        raise ConfigError("gpu", name, "no such GPU is known", near)
    return GPUS[key]


MOST_OVER_DATA_SHEET = 4.0
"""A bandwidth above this multiple of the data sheet's is taken for another unit, such as Gbit/s."""
MOST_NODES = 1_000_000


@dataclass(frozen=True)
class ClusterConfig:
    """GPUs and links on which a run is planned. Bandwidths are GB/s per GPU and direction, as data sheets state them;
    the planner knows which share of them collectives reach.
    """

    gpu: str = "H100"
    """Name of the GPU: A100-40G, A100-80G, A800, H100, H100-96G, H800, H20, H200, GH200, B200, B300, GB200 or GB300."""
    nodes: int = 128
    """Number of machines."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    nvlink_domain: int = 8
    """Neighbouring GPUs that NVLink connects: those of a node, or of a rack."""
    nvlink_gb_s: float = 450.0
    """NVLink's bandwidth."""
    network_gb_s: float = 50.0
    """Bandwidth of the network between NVLink domains."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("nodes", "gpus_per_node", "nvlink_domain", "nvlink_gb_s", "network_gb_s"))
        known = find_gpu(self.gpu)
        if self.nodes > MOST_NODES:
            raise ConfigError("nodes", self.nodes, f"must be at most {MOST_NODES:,}")
        domain, node = self.nvlink_domain, self.gpus_per_node
        if domain % node and node % domain:
            legal = sorted({*divisors(node), 2 * node})
            raise ConfigError("nvlink_domain", domain, f"must be a part of a node's {node} GPUs, or whole nodes", legal)
        for key, usual in (("nvlink_gb_s", known.nvlink), ("network_gb_s", known.network)):
            if getattr(self, key) > MOST_OVER_DATA_SHEET * usual:
                reason = f"is far above the {usual:g} GB/s of {known.name}: give GB/s per GPU and direction, not Gbit/s"
                raise ConfigError(key, getattr(self, key), reason, [usual])
        if self.network_gb_s > self.nvlink_gb_s:
            reason = f"must not exceed nvlink_gb_s={self.nvlink_gb_s:g}"
            raise ConfigError("network_gb_s", self.network_gb_s, reason, [min(known.network, self.nvlink_gb_s)])

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def description(self) -> Gpu:
        """The GPU with this cluster's links."""
        sizes = replace(find_gpu(self.gpu), domain=self.nvlink_domain, per_node=self.gpus_per_node)
        return replace(sizes, nvlink=self.nvlink_gb_s, network=self.network_gb_s)
