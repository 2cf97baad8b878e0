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
    EncoderShapes,
    ExpertShapes,
    Job,
    LatentShapes,
    LossKernel,
    ProductDtype,
    Shapes,
    Sharding,
    Software,
)

HEADER = {"case", "max_alloc_bytes", "hidden"}
_VOCABULARIES = (
    (r"mixtral_8x22b", 32_000),
    (r"^gpt/.*release|^mixtral", 256_000),
    (r"^bert", 30_522),
    (r"^t5", 29_096),
)
_NOT_GPT = re.compile(r"multimodal|mimo|vlm|grpo|hybrid|mamba|nemotron|retro|distill|inference")
_RELEASE_NODES = 16
"""Nodes of the tests before a release. The table does not say: static memory does."""

_LEAST_OVER_END = 1.001
"""A training step needs more memory for its activations than the least that this ratio allows between steps."""


def read(line: int, row: Row) -> Measured:
    """Return the job of one test. Raises `UnusableRow` for a model other than a decoder that the planner knows."""
    case = row["case"].strip().lower()
    if not case:
        raise UnusableRow("case is missing")
    other = _NOT_GPT.search(case)
    if other:
        raise UnusableRow(f"{other[0]}: the model is not a plain decoder, and the table does not give its other parts")
    gpu = find_gpu(_gpu_of(row["file"]))
    tp, pp, cp, ep = (count(row, name, 1, least=1) for name in ("tp", "pp", "cp", "ep"))
    experts = _experts(row)
    etp = count(row, "etp", tp, least=1) if experts else 1
    ranks = _ranks(case, gpu.per_node, tp, pp, cp, ep * etp)
    t5 = case.startswith("t5")
    layers = count(row, "layers", (48 if "11b" in case else 24) if t5 else None)
    vpp = _vpp(row, case, layers, pp)
    axes = Axes(tp, cp, pp, vpp, ep, etp, ranks // (tp * pp * cp), flag(row, "sp") and tp > 1)
    seq, mbs = count(row, "seq", 128 if t5 else None), count(row, "mbs")
    peak = number(row, "max_alloc_bytes")
    if peak is None or peak <= 0:
        raise UnusableRow("max_alloc_bytes is missing")
    left = number(row, "alloc_bytes_end")
    if left is not None and peak < left * _LEAST_OVER_END:
        raise UnusableRow("its peak is what is allocated at its end, so the record holds no training step")
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
        loss=_loss(case),
        forced_balance=False,
        traits=_traits(row, case),
        edges=_edges(case),
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
    usual = per_node if case.endswith("1node") else _RELEASE_NODES * per_node if "release" in case else 8
    return -(-usual // needed) * needed


def _vpp(row: Row, case: str, layers: int, pp: int) -> int:
    size = number(row, "vp_layers")
    if pp == 1:
        return 1
    if size:
        return max(1, int(layers // (pp * size)))
    if "account_for_embedding_loss" in case:  # embedding and loss fill a place of a layer each
        return max(1, (layers + 2) // pp)
    return 1


def _edges(case: str) -> tuple[int, int] | None:
    """Return the layers of the first and the last chunk, where the test's name says that they differ."""
    if "uneven_pipeline" in case:
        return 2, 2
    return (0, 0) if "account_for_embedding_loss" in case else None


def _experts(row: Row) -> ExpertShapes | None:
    experts = count(row, "experts", 0)
    if not experts:
        return None
    ffn = count(row, "ffn", 4 * count(row, "hidden"))
    return ExpertShapes(experts, count(row, "topk", 2), count(row, "moe_ffn", ffn), count(row, "shared", 0))


def _shapes(row: Row, case: str, layers: int, tp: int, seq: int, experts: ExpertShapes | None) -> Shapes:
    hidden, heads = count(row, "hidden"), count(row, "heads", least=1)
    vocab = count(row, "vocab", next((size for name, size in _VOCABULARIES if re.search(name, case)), 50_257))
    modern = flag(row, "swiglu") or re.search(r"15b_8t|^mixtral", case) is not None
    t5 = case.startswith("t5")
    latent = None
    if flag(row, "mla"):
        ranks = (1536, 512) if hidden >= 1024 else (None, 512)
        latent = LatentShapes(ranks[0], ranks[1], 64, 128, 128)
    return Shapes(
        hidden=hidden,
        layers=layers,
        ffn=count(row, "ffn", 4 * hidden),
        heads=heads,
        kv_heads=count(row, "query_groups", heads),
        vocab=padded(vocab, tp),
        head_dim=hidden // heads,
        gated=flag(row, "swiglu"),
        tied=not (modern or re.search(r"7b_|untie|uneven|mla", case)),
        biases=not (modern or experts or "disable_bias" in case),
        learned_positions=0 if modern or re.search(r"rope|mla", case) else 512 if t5 else seq,
        dropout=not modern or hidden < 1024,
        latent=latent,
        experts=experts,
        mtp=1 if re.search(r"(?<!no_)mtp|deepseekv3", case) else 0,
        encoder=EncoderShapes(layers // 2, 512) if t5 else None,
    )


def _attention(row: Row, case: str) -> AttentionKernel:
    stated = row.get("attn", "").strip().lower()
    if stated:
        return AttentionKernel.unfused if stated in ("unfused", "local") else AttentionKernel.flash
    old = "dracooci" in row["file"] or (case.startswith("moe/") and "lts" in row["file"])
    if old:  # these images had no fused attention in deterministic mode
        return AttentionKernel.unfused
    return AttentionKernel.unfused if _is_local(case) else AttentionKernel.flash


def _loss(case: str) -> LossKernel:
    if "deepseekv3" in case:
        return LossKernel.fused
    return LossKernel.compiled if re.search(r"cross_entropy_loss_fusion|mtp", case) else LossKernel.plain


def _is_local(case: str) -> bool:
    """Whether the layers are Megatron's own, not Transformer Engine's. "te" in a test's name tells."""
    name = case.split("/")[-1]
    return name.startswith(("gpt3_mcore_tp", "t5_mcore_tp")) or "uninstall_te" in name or "local_spec" in name


def _traits(row: Row, case: str) -> frozenset[str]:
    found = set()
    if _is_local(case):
        found.add("local_layers")
    if re.search(r"nondeterministic|cross_entropy_loss_fusion|release", case):
        found.add("free_workspace")
    if "defer_embedding_wgrad" in case:
        found.add("deferred_head_gradient")
    if flag(row, "grouped"):
        found.add("grouped_products")
    if row.get("fp8"):
        found |= {"fp8_activations", "fp8_copies"}
    return frozenset(found)
