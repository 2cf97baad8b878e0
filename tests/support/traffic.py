"""Compute the bytes handed to collectives in one optimizer step, in closed form.

On real ranks `parallel.mesh.Traffic` must count the same.

Shapes: D hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch

from data.images.batch import MODALITIES
from model.config import AuxScope, FeedForward, LayerConfig, ModelConfig, QKNorm
from model.load_balance import RouterSums
from model.roles import Role, registry
from parallel import whole_matrices
from parallel.cost import BatchShape, Copies, Entries, attention_traffic, expert_traffic
from parallel.layout import GatherExperts, Layout, Recompute, ReduceEvery
from parallel.mesh import meshes_of_rank
from parallel.parallelize import on_meta
from parallel.sharding import ShardSpec, shard_specs
from parallel.vision.exchange import PURPOSE
from precision.config import PrecisionConfig


def step_traffic(
    model: ModelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    batch: BatchShape,
    matrices: torch.dtype | None = None,
    image_tokens: int = 0,
    copies: Copies | None = None,
) -> dict[tuple[str, str], int]:
    """Return the bytes that all ranks of the world hand to collectives, by axis and purpose.

    Bytes are summed over ranks because routing decides how much each rank sends to the experts. There must be several
    ranks, and all micro-batches must be full. `matrices`: the dtype in which Muon's matrices are sent, None without
    Muon. `image_tokens`: those in the global batch. `copies`: those that were sent.
    """
    world, micro_batches = layout.world_size, batch.sequences // batch.micro_batch_size
    step, stage = _Step(model, precision, layout, batch), world // layout.pp
    found: Counter[tuple[str, str]] = Counter()
    for times, entries in (
        *(
            (stage * micro_batches, part)
            for part in (step.tensor(), step.context(), step.experts(copies), step.pipeline())
        ),
        (stage * (1 if layout.pp > 1 else micro_batches), step.gathers()),
        (stage * (1 if layout.pp > 1 or layout.reduce_every is ReduceEvery.step else micro_batches), step.reductions()),
        (stage, step.replicas()),
        (stage, step.whole_experts()),
        (1, step.once(image_tokens > 0)),
        (1, step.matrices(matrices)),
        (1, step.images(image_tokens)),
    ):
        for key, size in entries:
            found[key] += int(times * size)
    return {key: size for key, size in found.items() if size}


class _Step:
    """`tensor` to `pipeline` yield the bytes that an average rank of each stage sends per micro-batch."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape) -> None:
        self.model, self.precision, self.layout, self.batch = model, precision, layout, batch
        self.size = precision.compute_dtype.itemsize
        self.wide = max(4, self.size)
        self.tokens = batch.micro_batch_size * batch.seq_len // layout.cp
        self.mixtures = sum(layer.feed_forward is FeedForward.moe for layer in model.blocks)
        self.meshes = meshes_of_rank(layout, 0)
        self.whole = layout.gather_experts is GatherExperts.step and layout.pp == 1
        self.specs = shard_specs(registry(on_meta(model, precision)), model, self.meshes)

    def tensor(self) -> Entries:
        model, layout = self.model, self.layout
        if layout.tp == 1:
            return
        part = self.tokens // layout.tp * model.hidden_size * self.size
        whole, key = part * layout.tp, ("tp", "activations")
        yield key, whole + part  # embedding: scattered, its gradient gathered
        yield key, part + whole  # head: gathered, its gradient scattered
        yield ("tp", "loss"), 3 * self.tokens * self.wide  # maximum; sum of exponentials and the label's logit
        again, layer_again = layout.recompute is not Recompute.none, layout.recompute is Recompute.full
        for layer in model.blocks:
            yield key, 2 * (part + whole) + again * part + layer_again * whole  # attention
            if layer.qk_norm is QKNorm.full:
                yield key, (2 + layer_again) * 2 * self.tokens * self.wide  # sums of squares of queries and keys
            if layer.feed_forward is not FeedForward.moe or model.shared_hidden_size:
                yield key, 2 * (part + whole) + again * part  # the last operation of a layer is not recomputed
            yield ("tp", "balance"), self.balance(layer)

    def images(self, rows: int) -> Entries:
        """Yield the encoder's rows that all ranks together send to positions, and their gradients back."""
        if (axis := self.meshes.encoders(self.layout.vision.over_data_parallel and self.layout.dp > 1)).size > 1:
            yield (axis.name, PURPOSE), 2 * rows * self.model.hidden_size * self.size

    def context(self) -> Entries:
        if self.layout.cp > 1:
            for layer in self.model.blocks:
                yield from attention_traffic(self.model, layer, self.precision, self.layout, self.batch)
                yield ("cp", "balance"), self.balance(layer)

    def balance(self, layer: LayerConfig) -> int:
        """Return the bytes of the token counts of whole sequences, 0 if a layer's backward pass does not need them."""
        balance = self.model.balance
        split = layer.feed_forward is FeedForward.moe and balance.aux and balance.aux_scope is not AuxScope.whole
        return self.batch.micro_batch_size * self.model.num_experts * 8 if split else 0

    def experts(self, copies: Copies | None) -> Entries:
        tokens = self.tokens // self.layout.tp
        for key, size in expert_traffic(self.model, self.precision, self.layout, tokens, copies):
            yield key, self.mixtures * size

    def pipeline(self) -> Entries:
        """Yield hidden states from stage to stage, and their gradients back. Stages on the same rank send nothing."""
        hops = sum(one != other for one, other in itertools.pairwise(self.layout.stages(self.model).owners))
        for purpose in ("activations", "gradients"):
            yield ("pp", purpose), hops * (self.tokens // self.layout.tp) * self.model.hidden_size * self.size

    def gathers(self) -> Entries:
        """Yield the parameters that FSDP2 gathers in one micro-batch on a rank of each stage. Layers gather them for
        the forward pass and again for the backward pass, and so does the vision encoder. The head and the rest stay
        gathered in between, and the embedding is gathered for the forward pass only. In a pipeline everything is
        gathered once per step, but an encoder on all stages is gathered before and after the pipeline.
        """
        for name, spec, stages in self._sharded(self.whole):
            ahead = self.layout.encodes_ahead and spec.info.role.is_vision
            gathers = 2 if ahead or (name.startswith(("layers.", "vision.")) and self.layout.pp == 1) else 1
            elements = spec.local_block.numel  # of rank 0, whose shard is full; shorter shards are padded to its size
            if (axis := spec.fsdp_split.axis).size > 1:
                yield (axis.name, "parameters"), stages * gathers * self.size * elements

    def reductions(self) -> Entries:
        """Yield the gradients that FSDP2 reduce-scatters once on a rank of each stage."""
        for _, spec, stages in self._sharded(self.whole):
            if (axis := spec.fsdp_split.axis).size > 1:
                size = self.precision.master_dtype.itemsize * spec.local_block.numel
                yield (axis.name, "gradients"), stages * size * axis.size

    def replicas(self) -> Entries:
        """Yield the gradients that a rank of each stage sums over the replicas, once per step."""
        if self.layout.dp_replicate > 1:
            for _, spec, stages in self._sharded():
                size = self.precision.master_dtype.itemsize * spec.local_block.numel
                yield ("dp_replicate", "gradients"), stages * size

    def whole_experts(self) -> Entries:
        """Yield what experts that stay whole within a step gather and reduce-scatter once on a rank."""
        for _, spec, _ in self._sharded():
            if spec.info.role.is_expert and self.whole and (axis := spec.fsdp_split.axis).size > 1:
                yield (axis.name, "parameters"), self.size * spec.local_block.numel
                size = self.precision.master_dtype.itemsize * spec.local_block.numel
                yield (axis.name, "gradients"), size * axis.size

    def _sharded(self, without_experts: bool = False) -> Iterator[tuple[str, ShardSpec, int]]:
        """Yield the name of each parameter that FSDP2 shards, its spec, and the number of stages that have it."""
        for name, spec in self.specs.items():
            if spec.info.role is not Role.router and not (without_experts and spec.info.role.is_expert):
                ahead = self.layout.encodes_ahead and spec.info.role.is_vision
                both = 1 + any(axis.name == "ends" for axis in spec.replicas)  # tied embeddings are on both ends
                yield name, spec, self.layout.pp if ahead else both

    def once(self, has_images: bool) -> Entries:
        """Yield what all ranks together send once per step, besides Muon's matrices. With images, numbers of labels and
        losses are those of all documents and of each modality; a model with vision counts image tokens apart.
        """
        world, modalities = self.layout.world_size, len(MODALITIES) if has_images else 0
        yield ("world", "loss"), world * (1 + modalities) * (8 + 8)  # the number of labels, the loss
        yield ("world", "norm"), world * 8
        counts = self.model.num_experts * (1 if self.model.vision is None else 2)
        yield ("world", "balance"), world * self.mixtures * 8 * (counts + len(RouterSums._fields))
        for spec in self.specs.values():
            for axis in (one for one in spec.partial if one.size > 1):
                shards = 1 if spec.info.role is Role.router else self.layout.fsdp
                copies = world // self.layout.pp // shards * (2 if axis.name == "ends" else 1)
                copies *= self.layout.pp if self.layout.encodes_ahead and spec.info.role.is_vision else 1
                size = spec.compute_block.numel * self.precision.master_dtype.itemsize
                yield (axis.name, "gradients"), size * copies

    def matrices(self, sent: torch.dtype | None) -> Entries:
        """Yield what all ranks together send of Muon's matrices once per step. Along each split, ranks send their
        shards, which make up every matrix once, and the results.
        """
        for spec in self.specs.values():
            if sent is not None and spec.info.role.is_matrix:
                everywhere = math.prod(spec.info.shape) * math.prod(axis.size for axis in spec.replicas)
                for split in whole_matrices.matrix_splits(spec, self.meshes):
                    yield (split.axis.name, whole_matrices.PURPOSE), 2 * everywhere * sent.itemsize
