"""End-to-end runs of many sources in one table, and SimuMax's rows, which add that planner's own predictions.

Sources leave columns out and write the same thing in several ways. What a source says in words is in its notes.
"""

from __future__ import annotations

import re

from launch.plan.cluster import Generation, Gpu, find_gpu
from launch.plan.readers.common import Measured, MemoryKind, Row, UnusableRow, count, number, words
from launch.plan.workload import (
    AttentionKernel,
    Axes,
    ExpertShapes,
    Job,
    LatentShapes,
    LossKernel,
    ProductDtype,
    Shapes,
    Sharding,
    Software,
)

HEADER = {"source", "model", "gpu", "n_gpus", "tokens_s_gpu"}
GIB = 2**30
_FULL_ATTENTION = re.compile(r"full-attn|full \(non-causal\)|full attention", re.I)
_OLD_GPT = re.compile(r"gpt|megatron|mt-nlg|mpt|nemotron|bloom|opt", re.I)
_NEMO_WINDOW = 128


def read(line: int, row: Row) -> Measured:
    """Return the job of one run. Raises `UnusableRow` if neither its speed nor its memory was published."""
    notes, model = row.get("notes", ""), row["model"]
    gpu = find_gpu(row["gpu"], notes + " " + row["source"])
    shapes = _shapes(row, model, notes)
    software = _software(row)
    ranks, axes = _axes(row, shapes, software)
    seq, gbs = count(row, "seq"), count(row, "gbs")
    mbs = _micro_batch(row, axes, gbs, software)
    precision = _precision(row.get("precision", ""), gpu)
    recompute = _recompute(row, software)
    released = _year(row["source"])
    overlapped = "no overlap of communication" not in notes
    job = Job(
        shapes=shapes,
        axes=axes,
        gpu=gpu,
        seq=seq,
        mbs=mbs,
        gbs=gbs,
        precision=precision,
        sharding=_sharding(row, software),
        software=software,
        released=released,
        attention=AttentionKernel.unfused if released < 2022.8 else AttentionKernel.flash,
        recompute=recompute,
        loss=_loss(software, released),
        overlapped=overlapped,
        forced_balance="real routing" not in notes,
        traits=_traits(row, shapes, axes, precision, released, gpu),
    )
    step = _step_seconds(row, job, ranks, notes)
    peak = number(row, "peak_mem_gb")
    if step is None and peak is None:
        raise UnusableRow("neither speed nor memory was published")
    unit = GIB if re.search(r"peak_mem_gb is GiB", notes) else 1e9
    kind = MemoryKind.first_rank_peak if "rank-0" in notes else MemoryKind.fullest_rank_peak
    rival_step, rival_peak = number(row, "rival_step_ms"), number(row, "rival_peak_gib")
    return Measured(
        number=line,
        job=job,
        step_s=step,
        memory_bytes=None if peak is None else peak * unit,
        memory_kind=kind,
        source=row["source"],
        rival_step_s=None if rival_step is None else rival_step / 1e3,
        rival_memory_bytes=None if rival_peak is None else rival_peak * GIB,
    )


def _shapes(row: Row, model: str, notes: str) -> Shapes:
    hidden, heads = count(row, "hidden"), count(row, "heads", least=1)
    name = model.lower()
    head_dim = hidden // heads
    if "qwen3" in name:
        head_dim = 128
    elif "gpt" in name and "oss" in name:
        head_dim = 64
    latent = None
    latent_rank = number(row, "kv_lora_rank")
    if latent_rank or re.search(r"deepseek-?v[23]|kimi|moonlight|deepseek-?r1", name):
        default = None if re.search(r"lite|moonlight", name) else 1536
        query_rank = number(row, "q_lora_rank") or default
        rope = number(row, "rope_head_dim") or 64
        latent = LatentShapes(int(query_rank) if query_rank else None, int(latent_rank or 512), int(rope), 128, 128)
    old = _OLD_GPT.search(name) is not None and "oss" not in name
    ffn = count(row, "ffn", 0)
    return Shapes(
        hidden=hidden,
        layers=count(row, "layers"),
        ffn=ffn or 4 * hidden,
        heads=heads,
        kv_heads=count(row, "kv_heads", heads),
        vocab=count(row, "vocab"),
        head_dim=head_dim,
        gated=not old,
        tied=old and "340" not in name,
        biases=old,
        learned_positions=count(row, "seq") if old else 0,
        window=_NEMO_WINDOW if "sliding window" in notes or "oss" in name else None,
        latent=latent,
        experts=_experts(row, name, notes),
        biased_experts="oss" in name,
        mtp=1 if "deepseekv3" in name.replace("-", "") and "w/o MTP" not in notes else 0,
    )


def _experts(row: Row, name: str, notes: str) -> ExpertShapes | None:
    experts = count(row, "experts", 0)
    if not experts:
        return None
    size = count(row, "expert_ffn", count(row, "ffn", 0) or None)
    stated = re.search(r"first_dense_layers=(\d+)", notes)
    dense = number(row, "first_dense_layers")
    first = int(dense) if dense is not None else int(stated[1]) if stated else 0
    shared = count(row, "shared_experts", 0)
    every = max(1, count(row, "moe_every", 1))
    groups = 4 if re.search(r"deepseek-?v3", name) else None
    return ExpertShapes(experts, count(row, "topk"), size, shared * size, every, first, groups)


def _software(row: Row) -> Software:
    source, zero = row["source"].lower(), row.get("zero", "").lower()
    if "foundry" in source or "mosaic" in source:
        return Software.fsdp1
    if "deepspeed" in zero or "deepspeed" in source:
        return Software.deepspeed
    if "nanotron" in source:
        return Software.nanotron
    if re.search(r"torchtitan|automodel|trainy|torchtune|olmo", source):
        return Software.fsdp2
    return Software.megatron


def _axes(row: Row, shapes: Shapes, software: Software) -> tuple[int, Axes]:
    """Return the GPUs and the axes. What is missing follows from the rest."""
    ranks = count(row, "n_gpus")
    tp, cp, pp = (max(1, count(row, name, 1)) for name in ("tp", "cp", "pp"))
    if ranks % (tp * cp * pp):
        raise UnusableRow(f"tp*cp*pp={tp * cp * pp} does not divide n_gpus={ranks}")
    dp = ranks // (tp * cp * pp)
    ep, etp = max(1, count(row, "ep", 1)), max(1, count(row, "etp", 1))
    if (dp * cp * tp) % (ep * etp):
        raise UnusableRow(f"ep*etp={ep * etp} does not divide dp*cp*tp={dp * cp * tp}")
    vpp = max(1, count(row, "vpp", 0))
    if not number(row, "vpp") and _interleaves(row, software):
        # embedding and head often take the place of a layer each: 126 layers of Llama 3, 61 of DeepSeek-V3
        whole = (shapes.layers, shapes.layers + 2 + shapes.mtp)
        vpp = max((size for size in range(1, 9) if any(count % (pp * size) == 0 for count in whole)), default=1)
    if pp == 1 or pp * vpp > shapes.layers + 2:
        vpp = 1
    return ranks, Axes(tp, cp, pp, vpp, ep, etp, dp, sequence_parallel=_splits_sequence(row, software))


def _interleaves(row: Row, software: Software) -> bool:
    """Whether a pipeline has several chunks per stage though the table does not say how many. Megatron's users have
    interleaved since 2023; Bridge's tables leave the cell empty where there is one chunk.
    """
    if "interleaved" in row.get("notes", "").lower():
        return True
    return software is Software.megatron and _year(row["source"]) >= 2023 and "Bridge" not in row["source"]


def _splits_sequence(row: Row, software: Software) -> bool:
    """Whether the rest of a layer is split over tp too. Megatron does since 2022."""
    return software is not Software.megatron or (_year(row["source"]) >= 2022.4 and row.get("recompute") != "full")


def _micro_batch(row: Row, axes: Axes, gbs: int, software: Software) -> int:
    """Return the sequences of a micro-batch. Where none is given: 1 under a pipeline, else at most 4 or all."""
    given = count(row, "mbs", 0)
    share = max(1, gbs // axes.dp)
    if given:
        return min(given, share)
    return 1 if axes.pp > 1 else min(4, share)


def _precision(text: str, gpu: Gpu) -> ProductDtype:
    name = text.lower()
    if "fp4" in name:
        return ProductDtype.nvfp4
    if re.search(r"mx|blk|block", name):
        return ProductDtype.mxfp8 if gpu.generation is Generation.blackwell else ProductDtype.fp8
    if "fp8" in name or "float8" in name:
        return ProductDtype.fp8
    if "fp32" in name and "bf16" not in name:
        return ProductDtype.fp32
    return ProductDtype.fp16 if "fp16" in name else ProductDtype.bf16


def _recompute(row: Row, software: Software) -> frozenset[str]:
    text = row.get("recompute", "").strip().lower()
    if text.startswith("none") or not text or text in ("false", "no"):
        return frozenset()
    if "full" in text:
        return frozenset({"full"})
    return frozenset(re.sub(r"\W", "_", word) for word in words(text) if word != "sp")


def _loss(software: Software, released: float) -> LossKernel:
    if software is Software.fsdp2:
        return LossKernel.compiled
    return LossKernel.fused if software is Software.megatron and released > 2025 else LossKernel.plain


def _sharding(row: Row, software: Software) -> Sharding:
    text = row.get("zero", "").strip().lower()
    if re.search(r"no reshard|zero-?2|^2", text):
        return Sharding.gradients
    if "fsdp" in text or re.search(r"zero-?3|^3", text) or software in (Software.fsdp1, Software.fsdp2):
        return Sharding.parameters
    if text.startswith("0"):
        return Sharding.none
    return Sharding.optimizer


def _traits(row: Row, shapes: Shapes, axes: Axes, precision: ProductDtype, released: float, gpu: Gpu) -> frozenset[str]:
    """Return what else the source says or is known to use."""
    notes, source = row.get("notes", "").lower(), row["source"].lower()
    stated = {
        "short_documents": r"\bsft\b|lora",
        "ep_overlap": r"ep overlap on|a2a overlap|\+ ep overlap|hybridep \+ ep overlap",
        "plain_all_to_all": r"nccl a2a",
        "token_drop": r"token-drop",
        "cuda_graphs": r"cuda graph|hybridep",
    }
    found = {trait for trait, pattern in stated.items() if re.search(pattern, notes)}
    if "bridge" in source and released >= 2026.4 and gpu.generation is Generation.blackwell:
        found |= {"whole_graphs", "ep_overlap"}  # its MoE recipes on Blackwell since release 26.06
    if released >= 2024:
        found.add("fused_accumulation")
        if shapes.experts is not None:
            found.add("grouped_products")
    if precision.is_quantised:
        found.add("fp8_activations")
    if re.search(r"bridge|nemo ", source):
        found.add("bf16_gradients")
        if shapes.latent is not None:
            found.add("low_precision_optimizer")
    if released >= 2024.9 and axes.vpp > 1 and axes.ep > gpu.per_node:
        found.add("ep_overlap")  # recipes do where the experts leave a node, under an interleaved schedule
    return frozenset(found)


def _year(source: str) -> float:
    """Return when a source's software was new, from a release (26.04), a date (2026-08) or arXiv's number."""
    found = re.search(r"\b(2[3-9])\.(0[1-9]|1[0-2])\b", source)
    if found:
        return 2000 + int(found[1]) + (int(found[2]) - 1) / 12
    found = re.search(r"\b(20[12]\d)-(0[1-9]|1[0-2])", source)
    if found:
        return int(found[1]) + (int(found[2]) - 1) / 12
    found = re.search(r"\b(2\d)(0[1-9]|1[0-2])\.\d{4,5}", source)
    if found:
        return 2000 + int(found[1]) + (int(found[2]) - 1) / 12
    if "foundry" in source.lower():
        return 2023.8
    return 2025.5


def _step_seconds(row: Row, job: Job, ranks: int, notes: str) -> float | None:
    """Return the measured seconds of a step: tokens/s if published, else TFLOP/s with the source's own convention."""
    given = number(row, "step_ms")
    if given:
        return given / 1e3
    tokens = job.gbs * job.seq
    speed = number(row, "tokens_s_gpu")
    if speed:
        return tokens / (speed * ranks)
    rate = number(row, "tflops_per_gpu")
    if not rate:
        share = number(row, "mfu_pct")
        rate = share / 100 * job.gpu.bf16 if share else None
    if not rate:
        return None
    return tokens * _published_flops(row, job, notes) / (rate * 1e12 * ranks)


def _published_flops(row: Row, job: Job, notes: str) -> float:
    """Return the FLOPs per token that a source counts: see docs/plan.md."""
    year = _year(row["source"])
    flops = job.shapes.flops_per_token(job.seq)
    if _FULL_ATTENTION.search(notes) or year < 2025.2:
        attention = 6.0 * sum(
            job.shapes.reach(i, job.seq) * (job.shapes.query_size + job.shapes.value_size)
            for i in range(job.shapes.layers)
        )
        flops += attention
    if "hardware flops" in notes.lower():
        flops *= 4 / 3
    return flops
