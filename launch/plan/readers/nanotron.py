"""The sweep of layouts that the Ultra-Scale Playbook ran with nanotron on H100 nodes, failures included.

`Mem Alloc` is allocated memory between steps, in GiB; `Mem Res` the allocator's reservation at its peak. Rows that ran
out of memory lack most cells, so sizes also come from the row's name.
"""

from __future__ import annotations

import re

from launch.plan.cluster import find_gpu
from launch.plan.readers.common import Measured, MemoryKind, Row, UnusableRow, count, flag, number
from launch.plan.workload import Axes, Job, Shapes, Sharding, Software

HEADER = {"Mem Alloc (GB)", "tp_mode", "zero_stage"}
GIB = 2**30
_FFN = {2048: 8192, 3072: 8192, 4096: 14336, 8192: 28672, 16384: 53248}
"""Sizes of the MLP in Llama 3.1 and 3.2, whose shapes the sweep takes. The table lacks them."""
_TIED_BELOW = 4096


def read(line: int, row: Row) -> Measured:
    """Return the job of one trial. A trial that failed for another reason than memory measures nothing."""
    name = row["name"]
    hidden, heads = count(row, "hidden_size"), count(row, "num_heads", least=1)
    shared = re.search(r"gqa(\d+)", name)
    kv_heads = count(row, "num_kv_heads", int(shared[1]) if shared else heads)
    tied = flag(row, "tie_word_embeddings") if row.get("tie_word_embeddings") else hidden < _TIED_BELOW
    shapes = Shapes(
        hidden=hidden,
        layers=count(row, "num_layers"),
        ffn=_FFN.get(hidden, 4 * hidden),
        heads=heads,
        kv_heads=kv_heads,
        vocab=count(row, "vocab_size"),
        head_dim=hidden // heads,
        tied=tied,
    )
    seq, mbs = count(row, "seq_len"), count(row, "mbs")
    axes = Axes(tp=count(row, "tp"), pp=count(row, "pp"), dp=count(row, "dp"))
    batches = max(1, count(row, "batch_accum"))
    job = Job(
        shapes=shapes,
        axes=axes,
        gpu=find_gpu("H100"),
        seq=seq,
        mbs=mbs,
        gbs=mbs * batches * axes.dp,
        sharding=Sharding.optimizer if count(row, "zero_stage") else Sharding.none,
        software=Software.nanotron,
        released=2025.0,
        traits=frozenset({"slow_batches"}) if row.get("after_pp_fix", "").strip().lower() == "false" else frozenset(),
    )
    status = row.get("status", "").strip()
    if status not in ("Success", "OOM", "Other"):
        raise UnusableRow(f"status={status!r} is neither Success, OOM nor Other")
    done = status == "Success"
    tokens_s, static, peak = (number(row, name) for name in ("tok/s/gpu", "Mem Alloc (GB)", "Mem Res (GB)"))
    step = job.gbs * seq / (tokens_s * axes.ranks) if done and tokens_s else None
    return Measured(
        number=line,
        job=job,
        step_s=step,
        memory_bytes=static * GIB if done and static else None,
        memory_kind=MemoryKind.static,
        reserved_bytes=peak * GIB if done and peak else None,
        fits=None if status == "Other" else done,
        group=f"{hidden}x{shapes.layers}, {axes.ranks} GPUs, {job.gbs} sequences" if done else None,
        source="nanotron",
    )
