"""Peak memory that Megatron-LM's functional tests record, on their last rank.

The table has the arguments of each test, and its name has what the table lacks. Arguments that a test does not state
are Megatron's defaults: GPT-2's vocabulary, fp16, no distributed optimizer, 8 GPUs (4 on one GB200 node).
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath

from launch.plan.cluster import find_gpu
from launch.plan.readers.common import Measured, MemoryKind, Row, UnusableRow, count, flag, number, padded
from launch.plan.workload import (
    AttentionKernel,
    Axes,
    ExpertShapes,
    Job,
    LatentShapes,
    ProductDtype,
    Shapes,
    Sharding,
    Software,
)

HEADER = {"case", "max_alloc_bytes", "hidden"}
_VOCABULARIES = (
    (r"15b_8t", 256_000),
    (r"nemotron", 131_072),
    (r"mixtral", 32_000),
    (r"deepseek", 129_280),
    (r"bert", 30_522),
    (r"t5", 29_196),
)
_NOT_GPT = re.compile(r"t5|multimodal|mimo|vlm|grpo|hybrid|mamba|retro|distill")


def read(line: int, row: Row) -> Measured:
    """Return the job of one test. Raises `UnusableRow` where the model is no decoder that the planner knows."""
    case = row["case"].strip().lower()
    other = _NOT_GPT.search(case)
    if other:
        raise UnusableRow(f"{other[0]}: the model is no plain decoder, and the table does not give its other parts")
    gpu = find_gpu(_gpu_of(row["file"]))
    tp, pp, cp, ep = (count(row, name, 1) for name in ("tp", "pp", "cp", "ep"))
    experts = _experts(row)
    etp = count(row, "etp", tp) if experts else 1
    ranks = _ranks(case, gpu.per_node, tp, pp, cp, ep * etp)
    layers = count(row, "layers")
    axes = Axes(tp, cp, pp, _vpp(row, layers, pp), ep, etp, ranks // (tp * pp * cp), flag(row, "sp") and tp > 1)
    seq, mbs = count(row, "seq"), count(row, "mbs")
    peak = number(row, "max_alloc_bytes")
    if peak is None or peak <= 0:
        raise UnusableRow("max_alloc_bytes is missing")
    dtype = ProductDtype.bf16 if flag(row, "bf16") or row.get("fp8") else ProductDtype.fp16
    sharding = Sharding.optimizer if flag(row, "dist_opt") else Sharding.none
    if flag(row, "fsdp"):
        sharding = Sharding.parameters
    job = Job(
        shapes=_shapes(row, case, layers, tp, seq, experts),
        axes=axes,
        gpu=gpu,
        seq=seq,
        mbs=mbs,
        gbs=count(row, "gbs", mbs * axes.dp * 8),
        precision=dtype,
        sharding=sharding,
        optimizer_shards=2 if "multi_dist_optimizer_instances" in case else 1,
        software=Software.megatron,
        attention=_attention(row, case),
        recompute=frozenset(filter(None, [row.get("recompute", "").strip()])),
        fused_loss="cross_entropy_loss_fusion" in case,
        traits=_traits(row, case),
        edges=(2, 2) if "uneven_pipeline" in case else None,
    )
    step = number(row, "iter_time_s")
    return Measured(line, job, step, peak, MemoryKind.last_rank_peak, source=PurePosixPath(case).parts[0])


def _gpu_of(file: str) -> str:
    found = re.search(r"gb\d00|[abh]\d00", file.lower())
    if not found:
        raise UnusableRow("the file's name does not name a GPU")
    return found[0]


def _ranks(case: str, per_node: int, tp: int, pp: int, cp: int, sparse: int) -> int:
    """Return the GPUs of a test: one node of GB200 has 4, all others use 8, or as many as the layout needs."""
    needed = pp * math.lcm(tp * cp, sparse)
    usual = per_node if case.endswith("1node") else 8
    return -(-usual // needed) * needed


def _vpp(row: Row, layers: int, pp: int) -> int:
    size = number(row, "vp_layers")
    if pp == 1 or not size:
        return 1
    return max(1, int(layers // (pp * size)))


def _experts(row: Row) -> ExpertShapes | None:
    experts = count(row, "experts", 0)
    if not experts:
        return None
    ffn = count(row, "ffn", 4 * count(row, "hidden"))
    return ExpertShapes(experts, count(row, "topk", 2), count(row, "moe_ffn", ffn), count(row, "shared", 0))


def _shapes(row: Row, case: str, layers: int, tp: int, seq: int, experts: ExpertShapes | None) -> Shapes:
    hidden, heads = count(row, "hidden"), count(row, "heads")
    vocab = count(row, "vocab", next((size for name, size in _VOCABULARIES if re.search(name, case)), 50_257))
    large = hidden >= 2048
    rotary = large or re.search(r"rope|mla|moe_mcore|deepseek|mixtral", case) is not None
    latent = None
    if flag(row, "mla"):
        rank = (1536, 512) if hidden >= 4096 else (None, 512)
        latent = LatentShapes(rank[0], rank[1], 64, 128, 128)
    return Shapes(
        hidden=hidden,
        layers=layers,
        ffn=count(row, "ffn", 4 * hidden),
        heads=heads,
        kv_heads=count(row, "query_groups", heads),
        vocab=padded(vocab, tp),
        head_dim=hidden // heads,
        gated=flag(row, "swiglu"),
        tied=not (large or "untie" in case or "uneven" in case),
        biases=not (large or experts or "disable_bias" in case),
        learned_positions=0 if rotary else seq,
        dropout=not large,
        latent=latent,
        experts=experts,
        mtp=1 if re.search(r"(?<!no_)mtp", case) else 0,
    )


def _attention(row: Row, case: str) -> AttentionKernel:
    stated = row.get("attn", "").strip().lower()
    if stated in ("unfused", "local"):
        return AttentionKernel.unfused
    if stated:
        return AttentionKernel.flash
    local = "_te_" not in case and not case.startswith(("moe/gpt3_moe", "mixtral", "nemotron")) and "15b" not in case
    old = "dracooci" in row["file"]  # the images of that cluster had no fused attention in deterministic mode
    return AttentionKernel.unfused if (local and "7b" not in case) or old else AttentionKernel.flash


def _traits(row: Row, case: str) -> frozenset[str]:
    found = set()
    name = case.split("/")[-1]
    if re.match(r"gpt3_mcore_tp|bert.*local|gpt3_mcore_cp", name) and "_te_" not in name:
        found.add("local_layers")
    if "muon" in name:
        found.add("muon")
    if row.get("fp8"):
        found.add("fp8_copies")
    return frozenset(found)
