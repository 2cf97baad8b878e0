"""Distribute a single-device model over ranks. `parallelize` applies the techniques in order."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from model.attention.limits import check_heads
from model.attention.plan import ForwardContext
from model.config import ModelConfig
from model.init import reset_buffers
from model.moe import MixtureOfExperts
from model.roles import Role, registry
from model.transformer import Stack, Transformer
from model.vision.fusion import Images
from model.vision.towers import Network
from parallel import activation_checkpoint, compile, context_parallel, expert_parallel, fsdp, sharding, tensor_parallel
from parallel.context_parallel import ContextShard
from parallel.deepspeed import zero3, zero12
from parallel.layout import EngineKind, Layout, ParallelConfig, split_unit
from parallel.mesh import Meshes, meshes_of_rank
from parallel.pipeline import runtime
from parallel.sharding import ShardSpec
from parallel.vision import exchange
from parallel.vision.ahead import EncodedStep
from precision.config import AttentionKind, PrecisionConfig
from precision.resolve import Precision, resolve


def parallelize(
    model: Transformer,
    stacks: dict[int, Stack],
    specs: dict[str, ShardSpec],
    meshes: Meshes,
    precision: PrecisionConfig,
) -> None:
    """Apply TP, CP, EP, compile, activation checkpointing, then FSDP2, in place. Order matters.

    `stacks` are this rank's pipeline stages: `runtime.split_stages`. Names of modules and parameters do not change.
    """
    layout = meshes.layout
    _shrink_parameters(model, specs)
    tensor_parallel.apply(model, meshes.tp)
    context_parallel.apply(model, meshes.cp)
    expert_parallel.apply(model, meshes)
    _count_whole_sequences(model, meshes)
    if layout.compile:
        compile.apply(model, traces_whole=compile.traces_whole(layout, precision, model.attention))
    activation_checkpoint.apply(model, layout.recompute, layout.compile)
    if layout.engine is EngineKind.fsdp2:
        fsdp.apply(model, stacks, specs, meshes, precision)


@dataclass(frozen=True)
class ParallelNetwork:
    """The part of a network that this rank holds. `model` owns the local parameters, under their names in the whole
    network.
    """

    model: Network
    specs: dict[str, ShardSpec]
    meshes: Meshes

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class ParallelModel(ParallelNetwork):
    """The part of a language model that this rank holds. `stacks` are what runs, by stage: the model itself or, in a
    pipeline, one stack of the model's modules for each of this rank's stages.
    """

    model: Transformer
    stacks: dict[int, Stack]

    def context_shard(self, seq_len: int) -> ContextShard:
        """Return how context parallelism divides sequences of this length."""
        unit = split_unit(self.model.config, seq_len)
        return ContextShard(self.meshes.cp, seq_len, unit, self.meshes.layout.cp_method)

    def sequence_context(
        self, positions_BT: Tensor, routed_tokens: float | None = None, ahead: bool = False
    ) -> ForwardContext:
        """Return the `ForwardContext` for this rank's positions, made from the positions of whole sequences. `ahead`:
        of a later step, in which the model's settings may have changed; call `prepare` then.
        """
        shard = self.context_shard(positions_BT.shape[1])
        context = shard.sequence_context(positions_BT, self.device, routed_tokens)
        context.is_static = self.meshes.layout.compile
        if self.attention is AttentionKind.varlen:
            context.prepare_attention(self.model.config, self.attention)
        if not ahead:
            self.prepare(context)
        return context

    @property
    def attention(self) -> AttentionKind:
        """The kernels of attention: parts of sequences attend by segments."""
        return self.model.attention if self.meshes.cp.size == 1 else AttentionKind.segments

    def prepare(self, context: ForwardContext) -> None:
        """Build the tables that compiled layers read, on the current stream, with the model's present settings."""
        if self.meshes.layout.compile:
            context.prepare(self.model.config, self.model.compute_dtype, self.attention)

    def images(
        self, rows_BT: Tensor, tiles: int, pixels_N3SS: Tensor, greys: Tensor | None = None, ranks: int = 1
    ) -> Images | None:
        """Return the images of this rank's positions, for `ForwardContext.images` of `logits`, or for `encode_ahead`.
        None if other ranks encode them.

        `rows_BT`: the encoder row that each position of the whole sequences shows, or -1, on the host. `tiles`: the
        number of tiles of these sequences. `pixels_N3SS`: those of them that this rank encodes, as
        `vision.exchange.tile_share` selects them; with `greys`, grey levels in uint8: see `Images`. `ranks`: number of
        data-parallel ranks whose sequences these are, one after the other.
        """
        if self.model.vision is None:
            return None
        per_tile, shard = self.model.vision.config.tokens_per_tile, self.context_shard(rows_BT.shape[1])
        return exchange.spread(self.meshes, shard, rows_BT, tiles, per_tile, pixels_N3SS, greys, self.device, ranks)

    def padded_length(self, length: int) -> int:
        """Return the smallest length of at least `length` tokens that this layout can divide."""
        return self.meshes.layout.padded_length(self.model.config, length)

    def encode_ahead(self, images: Images | None, micro_batches: int) -> EncodedStep | None:
        """Encode the images of a step, made for all of its sequences at once, before the pipeline runs. Returns None
        if each micro-batch is encoded on its own.
        """
        encoder = self.model.vision
        if encoder is None or not self.meshes.layout.encodes_ahead:
            return None
        return EncodedStep(encoder, images, micro_batches, self.device)

    @torch.no_grad()
    def outputs(self, tokens_BT: Tensor, context: ForwardContext) -> Tensor | None:
        """Run a forward pass over this rank's part of the sequences. Returns logits, or the losses of the context's
        labels; None if another rank has the head.
        """
        if context.images is not None and (encoded := self.encode_ahead(context.images, 1)):
            (context.images,) = encoded.micro_batches()
        if self.meshes.pp.size > 1:
            return runtime.forward(self.stacks, self.model, self.meshes, tokens_BT, context)
        return self.model(tokens_BT, context)


def build(
    config: ModelConfig,
    precision: PrecisionConfig,
    meshes: Meshes,
    device: torch.device,
    seed: int,
    frozen: AbstractSet[Role] = frozenset(),
    kind: torch.device | None = None,
) -> ParallelModel:
    """Build, distribute and initialise a model. Each rank allocates only its own part. Parameters of `frozen` roles
    have `requires_grad=False`, by which engines and optimizers know them.

    `kind`: the device whose kernels are chosen, if `device` is the meta device, on which nothing is initialised.
    """
    kind = kind or device
    check_heads(config, precision, kind)
    layout, model = meshes.layout, on_meta(config, precision, resolve(precision, kind, runs=device.type != "meta"))
    freeze(model, frozen)
    stacks = runtime.split_stages(model, meshes)
    specs = sharding.shard_specs(registry(model), config, meshes)
    parallelize(model, stacks, specs, meshes, precision)
    if layout.engine is EngineKind.deepspeed:
        _cast_to_compute_dtype(model, specs, precision)
    if layout.zero_stage == 3:
        zero3.partition(model, meshes, device)
    roots = [*stacks.values()] + ([model.vision] if model.vision is not None and layout.encodes_ahead else [])
    for root in roots:
        root.to_empty(device=device)
    fsdp.count_traffic(roots, meshes)
    if layout.zero_stage != 3 and device.type != "meta":  # in stage 3 the engine sets the initial weights
        sharding.initialise(sharding.local_shards(model, specs), config, seed)
    reset_buffers(model)
    return ParallelModel(model, specs, meshes, stacks)


def freeze(model: Network, frozen: AbstractSet[Role]) -> None:
    """Stop the gradients of the parameters of some roles."""
    for name, info in registry(model).items():
        model.get_parameter(name).requires_grad_(info.role not in frozen)


def on_meta(config: ModelConfig, precision: PrecisionConfig, products: Precision | None = None) -> Transformer:
    """Build the whole model on the meta device, in the master dtype. It cannot run without `products`."""
    with on_meta_device(precision):
        return Transformer(config, products or Precision(precision))


@contextmanager
def on_meta_device(precision: PrecisionConfig) -> Iterator[None]:
    """Make new parameters on the meta device, in the master dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(precision.master_dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(previous)


def resolve_layout(
    parallel: ParallelConfig,
    world_size: int,
    model: ModelConfig,
    precision: PrecisionConfig,
    moments: torch.dtype | None,
    muon: bool,
) -> Layout:
    """Return the layout of a world of this size, after every check that needs no batch. Raises `ConfigError`.

    `moments`: the dtype of the optimizer's moments, or None.
    """
    layout = parallel.resolve(world_size)
    layout.check_model(model)
    expert_parallel.check(layout.dispatch, precision.compute_dtype)
    zero12.check(layout, precision.master_dtype, moments, muon, model.has_experts, precision.uses_float8)
    check_float8(model, precision, layout)
    check_heads(model, precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return layout


def check_float8(config: ModelConfig, precision: PrecisionConfig, layout: Layout) -> None:
    """Reject settings that leave nothing in FP8, and matrices whose shapes on a rank the FP8 recipe cannot take."""
    if not precision.uses_float8:
        return
    first, last, layers = precision.bf16_first_layers, precision.bf16_last_layers, len(config.blocks)
    if first + last >= layers:
        key, value = ("bf16_first_layers", first) if first >= layers else ("bf16_last_layers", last)
        raise ConfigError(f"precision.{key}", value, f"leaves none of the {layers} layers in FP8")
    recipe = precision.recipe.on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = on_meta(config, precision)
    specs = sharding.shard_specs(registry(model), config, meshes_of_rank(layout, 0))
    key, chosen = "precision.fp8_products", precision.fp8_products
    if not {info.role.products for info in registry(model).values()} & set(chosen):
        named = ", ".join(products.value for products in chosen)
        raise ConfigError(key, None, f"names {named}, which this model does not have")
    for index, layer in model.layers.items():
        for name, info in registry(layer).items():
            products = info.role.products
            if not precision.in_float8(products, int(index), layers):
                continue
            rows, columns = specs[f"layers.{index}.{name}"].compute_block.shape[-2:]
            if rows % recipe.multiple or columns % recipe.multiple:
                what = f"the {info.role.value} of layer {index} is {rows} x {columns} on a rank"
                advice = "change the model's sizes or the degrees under parallel.*, or omit these matrices"
                reason = f"{what}, but {recipe.value} takes multiples of {recipe.multiple}: {advice}"
                others = ",".join(one.value for one in chosen if one is not products)
                raise ConfigError(key, products, reason, [f"[{others}]"])


def _cast_to_compute_dtype(model: Transformer, specs: dict[str, ShardSpec], precision: PrecisionConfig) -> None:
    """Cast parameters, for an engine with its own master weights, to the dtypes that FSDP2 would all-gather: bf16 under
    bf16 compute, except routers, which keep the master dtype. So do frozen parameters, which have no master weights.
    """
    if precision.compute_dtype is torch.bfloat16:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and specs[name].info.role is not Role.router:
                parameter.data = parameter.data.to(torch.bfloat16)


def _shrink_parameters(model: Transformer, specs: dict[str, ShardSpec]) -> None:
    """Replace each parameter that TP or EP splits by one of the shape that this rank computes with."""
    for name, parameter in list(model.named_parameters()):
        if specs[name].splits:
            owner, _, attribute = name.rpartition(".")
            part = torch.empty(specs[name].compute_block.shape, dtype=parameter.dtype, device=parameter.device)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(part, parameter.requires_grad))


def _count_whole_sequences(model: Transformer, meshes: Meshes) -> None:
    """Make routers sum the token counts of each sequence over the ranks that hold parts of it."""
    axes = [axis for axis in (meshes.cp, meshes.tp) if axis.size > 1]

    def over_all(counts_BE: Tensor) -> None:
        for axis in axes:
            axis.sum(counts_BE, "balance")

    for layer in model.layers.values():
        if isinstance(layer.ffn, MixtureOfExperts):
            layer.ffn.router.balance.sum_over_sequence = over_all
