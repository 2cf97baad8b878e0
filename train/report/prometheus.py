"""Metrics for Prometheus: a file in its text format, replaced at each logged step.

The textfile collector of node_exporter reads `*.prom` in its folder. Format:
https://prometheus.io/docs/instrumenting/exposition_formats. All metrics are gauges: a run that resumes goes back.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.files import write_text


@dataclass(frozen=True)
class MetricFamily:
    """A metric. `pattern` matches the path of its number in a line of metrics, and the groups in it are labels."""

    name: str
    help: str
    pattern: str = ""


SLOW = MetricFamily("leviathan_slow_rank_ratio", "Time of a rank that is reported as slow over the ranks' median.")
LOGGED = MetricFamily("leviathan_logged_timestamp_seconds", "Unix time at which the newest line was logged.")
OTHER = MetricFamily(
    "leviathan_metric", "Any other number of the newest lines, by its path in metrics.jsonl.", "(?P<name>.+)"
)
FAMILIES = (
    MetricFamily("leviathan_step", "Optimizer steps done.", "step"),
    MetricFamily("leviathan_tokens", "Tokens trained on.", "tokens"),
    MetricFamily("leviathan_loss", "Training loss of the newest logged step, in nats per token or pair.", "loss"),
    MetricFamily("leviathan_heldout_loss", "Held-out loss, in nats per token or pair.", "heldout_loss"),
    MetricFamily(
        "leviathan_heldout_source_loss",
        "Held-out loss of one source, in nats per token.",
        "heldout/(?P<source>.+)/loss",
    ),
    MetricFamily("leviathan_learning_rate", "Learning rate.", "learning_rate"),
    MetricFamily("leviathan_gradient_norm", "Global gradient norm before clipping.", "gradient_norm"),
    MetricFamily("leviathan_tokens_per_second", "Throughput, in tokens per second.", "tokens_per_second"),
    MetricFamily("leviathan_mfu_ratio", "Model FLOPs utilization, 0 to 1.", "mfu"),
    MetricFamily("leviathan_peak_memory_bytes", "Peak memory of rank 0, in bytes.", "peak_memory_bytes"),
    MetricFamily(
        "leviathan_data_wait_seconds", "Seconds that rank 0 waited for data since the line before.", "data_wait_s"
    ),
    MetricFamily(
        "leviathan_expert_load_max_over_mean",
        "Load of the busiest expert over the mean, by position of the MoE layer.",
        r"expert_load/(?P<moe_layer>\d+)/max_over_mean",
    ),
    MetricFamily(
        "leviathan_expert_load_entropy_ratio",
        "Entropy of the experts' load over its maximum, by position of the MoE layer.",
        r"expert_load/(?P<moe_layer>\d+)/entropy",
    ),
    MetricFamily(
        "leviathan_dead_experts",
        "Experts without a token, by position of the MoE layer.",
        r"expert_load/(?P<moe_layer>\d+)/dead",
    ),
    OTHER,
)
Samples = dict[tuple[MetricFamily, tuple[tuple[str, str], ...]], float]


class PrometheusFile:
    """Keeps the newest number of each metric and writes all of them. A failure to write is logged once."""

    def __init__(self, path: Path, run: str, log: Callable[[str], None]) -> None:
        self.path, self.run, self.log = path, run, log
        self._numbers: Samples = {}
        self._slow: Samples = {}
        self._failed = False

    def write(
        self, numbers: Iterable[tuple[str, float]], slow_ranks: Iterable[Mapping[str, object]] | None = None
    ) -> None:
        """Replace the file. `numbers`: those in a line of metrics, each with its path of keys and positions.
        `slow_ranks`: the ranks that are slow now; None: those of the last call.
        """
        for path, value in numbers:
            if not path.startswith("slow_ranks/"):
                family, labels = _family(path)
                self._numbers[family, (("run", self.run), *labels)] = value
        if slow_ranks is not None:
            self._slow = {}
            for one in slow_ranks:
                labels = tuple((key, str(one[key])) for key in ("rank", "host", "kind"))
                self._slow[SLOW, (("run", self.run), *labels)] = float(str(one["times_the_median"]))
        samples = {**self._numbers, **self._slow, (LOGGED, (("run", self.run),)): time.time()}
        try:
            write_text(self.path, exposition(samples))
            self._failed = False
        except OSError as error:
            if not self._failed:
                self.log(f"{self.path}: {os.strerror(error.errno or 0)}; it keeps older metrics")
            self._failed = True


def exposition(samples: Samples) -> str:
    """Return samples in Prometheus's text format: each family once, with its help and type."""
    lines = []
    for family in (*FAMILIES, SLOW, LOGGED):
        found = {labels: value for (owner, labels), value in samples.items() if owner is family}
        if found:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} gauge"]
            lines += [f"{family.name}{{{_labels(labels)}}} {_number(value)}" for labels, value in found.items()]
    return "".join(f"{line}\n" for line in lines)


def _family(path: str) -> tuple[MetricFamily, tuple[tuple[str, str], ...]]:
    for family in FAMILIES:
        if found := re.fullmatch(family.pattern, path, re.DOTALL):
            return family, tuple(found.groupdict().items())
    raise AssertionError("the last pattern matches every path")


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)


def _escaped(value: str) -> str:
    """Escape what ends a label's value. Characters that UTF-8 cannot express become question marks."""
    text = value.encode(errors="replace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
