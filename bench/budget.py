"""Count what a layer and the loss cost on a GPU, without one: launches, host synchronisations and bytes.

    python -m bench.budget [--json FILE]

The layer is Llama 4 Scout's MoE layer in bfloat16 on meta tensors, with the code that runs on GPUs: forward and
backward of a micro-batch of 8,192 tokens. It is not the first of its step, so gradients are added, and weights are not
cast. `launches` are those of packed rows of 1, 8 and 32 documents. `saved_bytes` are those that a token keeps from the
forward to the backward pass, its input among them, for each kind of recomputation. `loss_peak_bytes` is the peak of
head and loss without the weight and its gradient, and `loss_launches` are their launches; `_tp2` is one of two ranks of
tensor parallelism. `step_launches` and `step_syncs` are those of `bench.budget_step`. `quantise_calls` and
`product_calls` are the calls of an FP8 library for a micro-batch, for 8 and 128 experts, and `weight_quantise_calls`
those for the weights in a step of 1 and 4 micro-batches, all with the blockwise recipe, as are `saved_bytes_fp8` and
`syncs_fp8`. `syncs_ep` and `launches_ep` are those of the layer as one of eight ranks of expert parallelism, without a
network: routing is balanced, and a copy to the host gives its counts.

`launches_recompute` are those of each kind of recomputation, `launches_gathered` those with weights in bfloat16, as
FSDP2 gathers them (its own casts and copies are not counted), and `launches_prepare` those that prepare a micro-batch
for all layers. `moved_bytes` are the bytes of the operands and results of the operators that move most.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.counting import Float8Calls
from core.files import write_json
from model.attention.plan import ForwardContext
from model.config import ModelConfig
from model.head import Head
from model.moe import Experts, MixtureOfExperts
from model.roles import Role
from model.transformer import Layer, Stack
from parallel import activation_checkpoint, expert_parallel
from parallel.checks.counting import Counter
from parallel.layout import DispatchMethod, ParallelConfig, Recompute
from parallel.mesh import meshes_of_rank
from precision.config import Compute, PrecisionConfig
from precision.fp8_linear import Float8Gemm, Operand
from precision.resolve import resolve

TOKENS = 8192
DOCUMENTS = (1, 8, 32)
EXPERTS = (8, 128)
MICRO_BATCHES = (1, 4)
RANKS = 8
GPU, META = torch.device("cuda"), torch.device("meta")
SCOUT = ModelConfig()
BFLOAT16 = resolve(PrecisionConfig(compute=Compute.bfloat16), GPU)


class LayerCase:
    """One layer on meta tensors. Its parameters have gradients, as after the first micro-batch of a step. `float8`:
    the FP8 library, or None.
    """

    def __init__(
        self,
        model: ModelConfig = SCOUT,
        recompute: Recompute = Recompute.none,
        index: int = 0,
        float8: Float8Calls | None = None,
        change: Callable[[Layer], None] = lambda layer: None,
        values: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`change` distributes the layer; `values`: see `Counter`."""
        blocks = model.blocks
        BFLOAT16.clock.tick()
        gemms = BFLOAT16.at(index, len(blocks))
        if float8 is not None:
            gemms = replace(gemms, float8=lambda products, name: Float8Gemm(float8, name))
        with META:
            layer = Layer(model, blocks[index], gemms)
            change(layer)
        self.values = values
        self.prepared = Counter()
        self.model, self.stack = model, Stack(None, {str(index): layer}, None, None)
        activation_checkpoint.apply(self.stack, recompute)  # type: ignore[arg-type]
        self(1, collect=False)

    def __call__(self, documents: int, tokens: int = TOKENS, collect: bool = True) -> tuple[Counter, int]:
        """Run a micro-batch. Return its counts, and the bytes that are alive between forward and backward pass, which
        are exact after garbage is collected.
        """
        positions_BT = torch.arange(tokens // documents).repeat(documents)[None]
        with Counter() as self.prepared:
            context = ForwardContext(positions_BT, META, float(tokens))
            context.prepare(self.model, torch.bfloat16, BFLOAT16.attention)
        x_BTD = torch.empty(1, tokens, self.model.hidden_size, device=META, dtype=torch.bfloat16, requires_grad=True)
        if collect:
            gc.collect()
        with Counter(values=self.values) as counter:
            y_BTD = self.stack(x_BTD, context)
            counter.forget(y_BTD)
            kept = counter.live + x_BTD.nbytes
            y_BTD.backward(torch.empty_like(y_BTD))
        return counter, kept


def ep_counts(
    dispatch: DispatchMethod = DispatchMethod.all_to_all,
    top_k: int = SCOUT.router.top_k,
    node_size: int | None = None,
) -> Counter:
    """Return the counts of an MoE layer as one of `RANKS` ranks over which its experts are split."""
    local, model = SCOUT.num_experts // RANKS, replace(SCOUT, router=replace(SCOUT.router, top_k=top_k))

    def split(layer: Layer) -> None:
        assert isinstance(layer.ffn, MixtureOfExperts)
        layer.ffn.experts = Experts(local, SCOUT.hidden_size, SCOUT.expert_hidden_size, BFLOAT16.plain)
        config = ParallelConfig(ep=RANKS, dispatch=dispatch, exchange_node_size=node_size)
        meshes = meshes_of_rank(config.resolve(RANKS), 0)
        meshes = replace(meshes, experts=replace(meshes.experts, group=dist.group.WORLD))
        expert_parallel.apply(SimpleNamespace(layers={"0": layer}, config=model), meshes)  # type: ignore[arg-type]

    def balanced(counts: Tensor) -> Tensor:
        """Return what the host reads of counts [E], or [X, N], which end with those of E experts by sending rank. The
        rows before say how many tokens each rank is sent and sends. By node, it reads four such rows and [E] in one.
        """
        slots = TOKENS * top_k
        if len(counts) == 4 * RANKS + local:
            return torch.tensor([TOKENS // RANKS] * 4 * RANKS + [slots * RANKS // SCOUT.num_experts] * local)
        if counts.dim() == 1:
            return torch.full(counts.shape, slots * RANKS // SCOUT.num_experts)
        rows = [TOKENS * min(top_k, RANKS) // RANKS] * (len(counts) - local) + [slots // SCOUT.num_experts] * local
        return torch.tensor(rows)[:, None].expand(counts.shape)

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        return LayerCase(model, change=split, values=balanced)(DOCUMENTS[-1])[0]
    finally:
        dist.destroy_process_group()


def launches(model: ModelConfig = SCOUT) -> dict[int, tuple[Counter, Counter]]:
    """Return the counts of a layer, and of what is prepared for all layers, for rows of 1, 8 and 32 documents."""
    case = LayerCase(model)
    return {documents: (case(documents)[0], case.prepared) for documents in DOCUMENTS}


def recomputed(float8: bool = False) -> dict[str, tuple[Counter, float]]:
    """Return the counts of a layer and the bytes that it keeps of a token, for each kind of recomputation."""
    found = {}
    for mode in Recompute:
        counter, kept = LayerCase(recompute=mode, float8=Float8Calls() if float8 else None)(DOCUMENTS[-1])
        found[mode.value] = counter, kept / TOKENS
    return found


def gathered() -> Counter:
    """Return the counts of a layer whose weights, but the router's, are in bfloat16, as FSDP2 gathers them."""

    def narrow(layer: Layer) -> None:
        assert isinstance(layer.ffn, MixtureOfExperts)
        layer.to(torch.bfloat16)
        layer.ffn.router.float()

    return LayerCase(change=narrow)(DOCUMENTS[-1])[0]


def quantise_calls(model: ModelConfig = SCOUT) -> Float8Calls:
    """Return the calls of an FP8 library for a micro-batch that is not the first of its step."""
    library = Float8Calls()
    case = LayerCase(model, float8=library)
    library.clear()
    case(1, collect=False)
    return library


def weight_quantise_calls(micro_batches: int, model: ModelConfig = SCOUT) -> int:
    """Return the calls that quantise a layer's weights in a step of `micro_batches`."""
    library = Float8Calls()
    case = LayerCase(model, float8=library)
    library.clear()
    increment_version(case.stack.parameters())  # as the optimizer does
    for _ in range(micro_batches):
        case(1, collect=False)
    return library.quantised[Operand.weight]


class _Half:
    """Half of the vocabulary, as under tensor parallelism over two ranks; nothing is sent."""

    start = 0

    def max(self, x: Tensor) -> None: ...

    def sum(self, x: Tensor) -> None: ...


def loss_counts(ranks: int = 1, tokens: int = TOKENS) -> Counter:
    """Return the counts of head and loss, forward and backward. The gradient of the weight, which exists during all of
    the backward pass, is not in the peak.
    """
    BFLOAT16.clock.tick()
    with META:
        head = Head(SCOUT.hidden_size, SCOUT.vocab_size // ranks, Role.head, BFLOAT16.plain)
        x_BTD = torch.empty(1, tokens, SCOUT.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        labels_BT = torch.zeros(1, tokens, dtype=torch.int64)
    head.shard = _Half() if ranks > 1 else None
    narrow = head.gemm.narrowed(head.weight)  # the copy of the optimizer step
    with Counter() as counter:
        loss = head(x_BTD, labels_BT).sum()
        forward_peak = counter.peak
        loss.backward()
    assert head.weight.grad is not None
    counter.memory.peak = max(forward_peak, counter.peak - head.weight.grad.nbytes)
    del narrow
    return counter


def report() -> dict[str, Any]:
    from bench.budget_step import step_counts  # engines need libraries that a layer does not

    both, losses, (step_launches, step_syncs) = launches(), loss_counts(), step_counts(TOKENS)
    counts = {documents: counter for documents, (counter, _) in both.items()}
    split_losses, modes, float8_modes, ranks = loss_counts(2), recomputed(), recomputed(float8=True), ep_counts()
    float8 = {str(experts): quantise_calls(replace(SCOUT, num_experts=experts)) for experts in EXPERTS}
    return {
        "launches": {str(documents): counter.launches.total() for documents, counter in counts.items()},
        "launches_recompute": {mode: counter.launches.total() for mode, (counter, _) in modes.items()},
        "launches_gathered": gathered().launches.total(),
        "launches_ep": ranks.launches.total(),
        "launches_prepare": {str(documents): counter.launches.total() for documents, (_, counter) in both.items()},
        "operators": dict(counts[DOCUMENTS[-1]].launches.most_common()),
        "moved_bytes": dict(counts[DOCUMENTS[-1]].moved.most_common(5)),
        "syncs": sum(counter.syncs.total() for pair in both.values() for counter in pair),
        "syncs_ep": ranks.syncs.total(),
        "syncs_fp8": {mode: counter.syncs.total() for mode, (counter, _) in float8_modes.items()},
        "saved_bytes": {mode: kept for mode, (_, kept) in modes.items()},
        "saved_bytes_fp8": {mode: kept for mode, (_, kept) in float8_modes.items()},
        "loss_peak_bytes": losses.peak,
        "loss_peak_bytes_tp2": split_losses.peak,
        "loss_launches": losses.launches.total(),
        "loss_launches_tp2": split_losses.launches.total(),
        "step_launches": step_launches,
        "step_syncs": step_syncs,
        "quantise_calls": {experts: calls.quantised.total() for experts, calls in float8.items()},
        "product_calls": {experts: calls.products for experts, calls in float8.items()},
        "weight_quantise_calls": {str(count): weight_quantise_calls(count) for count in MICRO_BATCHES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    arguments = parser.parse_args()
    found = report()
    for key, value in found.items():
        print(f"{key}: {json.dumps(value)}")
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
