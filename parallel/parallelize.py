"""From a network for one device to its place in a layout: the order of the techniques, on one screen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from model.attention.plan import ForwardContext
from model.config import ModelConfig
from model.init import reset_buffers
from model.moe import MixtureOfExperts
from model.roles import Role, registry
from model.transformer import Stack, Transformer
from parallel import activation_checkpoint, compile, context_parallel, expert_parallel, fsdp, sharding, tensor_parallel
from parallel.deepspeed import zero3
from parallel.layout import EngineKind, Layout
from parallel.mesh import Meshes, place
from parallel.pipeline import runtime
from parallel.sharding import ShardSpec
from precision.config import PrecisionConfig, Products
from precision.resolve import Precision, resolve


@dataclass(frozen=True)
class ParallelModel:
    """A model's part on this rank.

    `model` owns the parameters that are here, under the names of the whole model. `stacks` are what runs: the model
    itself or, in a pipeline, a stack for each of this rank's stages, which share the model's modules.
    """

    model: Transformer
    specs: dict[str, ShardSpec]
    meshes: Meshes
    stacks: dict[int, Stack]

    def share(self, length: int) -> context_parallel.ContextShard:
        """This rank's part of rows of `length` tokens."""
        return context_parallel.share(self.model.config, length, self.meshes.cp, self.meshes.layout.cp_method)

    def context(self, positions_BT: Tensor, routed_tokens: float | None = None) -> ForwardContext:
        """What this rank's layers know of whole rows at these positions."""
        found = self.share(positions_BT.shape[1]).context(positions_BT, self.device, routed_tokens)
        if self.meshes.layout.compile:
            found.prepare(self.model.config, self.model.compute_dtype)
        return found

    def fitting(self, length: int) -> int:
        """The shortest row of at least `length` tokens that this layout can divide."""
        return self.meshes.layout.fitting(self.model.config, length)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, context: ForwardContext) -> Tensor | None:
        """A forward pass over this rank's part of the rows; None where another rank has the head."""
        if self.meshes.pp.size > 1:
            return runtime.forward(self.stacks, self.model, self.meshes, tokens_BT, context)
        return self.model(tokens_BT, context)


def build(
    config: ModelConfig, precision: PrecisionConfig, meshes: Meshes, device: torch.device, seed: int
) -> ParallelModel:
    """The model, laid out and initialised, and the place of each of its parameters.

    Nothing is allocated before the layout is applied: each rank only ever holds its own part.
    """
    model = on_meta(config, precision, resolve(precision, device))
    stacks = runtime.cut(model, meshes)
    specs = sharding.shard_specs(registry(model), config, meshes)
    parallelize(model, stacks, specs, meshes, precision)
    if meshes.layout.engine is EngineKind.deepspeed:
        _narrow(model, specs, precision)
    if meshes.layout.zero_stage == 3:
        zero3.partition(model, meshes, device)
    for stack in stacks.values():
        stack.to_empty(device=device)
    if meshes.layout.zero_stage != 3:  # whose engine makes the initial weights
        sharding.initialise(sharding.stored(model, specs), config, seed)
    reset_buffers(model)
    return ParallelModel(model, specs, meshes, stacks)


def parallelize(
    model: Transformer,
    stacks: dict[int, Stack],
    specs: dict[str, ShardSpec],
    meshes: Meshes,
    precision: PrecisionConfig,
) -> None:
    """Each technique wraps what the former left; data parallelism comes last."""
    _cut(model, specs)
    tensor_parallel.apply(model, meshes.tp)
    context_parallel.apply(model, meshes.cp, meshes.layout.cp_method)
    expert_parallel.apply(model, meshes)
    _count_whole_rows(model, meshes)
    activation_checkpoint.apply(model, meshes.layout.recompute)
    if meshes.layout.compile:
        compile.apply(model)
    if meshes.layout.engine is EngineKind.fsdp2:
        fsdp.apply(model, stacks, specs, meshes, precision)


def on_meta(config: ModelConfig, precision: PrecisionConfig, products: Precision | None = None) -> Transformer:
    """The whole model without storage, in the master format. Without `products` it is for looking at, not to run."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(precision.master_dtype)
    try:
        with torch.device("meta"):
            return Transformer(config, products or Precision(precision))
    finally:
        torch.set_default_dtype(previous)


def check_float8(config: ModelConfig, precision: PrecisionConfig, layout: Layout) -> None:
    """Refuse matrices that an FP8 recipe cannot take, in the shapes that each rank has."""
    if not precision.uses_float8:
        return
    first, last, layers = precision.bf16_first_layers, precision.bf16_last_layers, len(config.blocks)
    if first + last >= layers:
        key, value = ("bf16_first_layers", first) if first >= layers else ("bf16_last_layers", last)
        raise ConfigError(f"precision.{key}", value, f"leaves none of the {layers} layers in FP8")
    recipe = precision.recipe.on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = on_meta(config, precision)
    specs = sharding.shard_specs(registry(model), config, place(layout, 0))
    if not {info.role.products for info in registry(model).values()} & set(precision.fp8_products):
        named = ", ".join(products.value for products in precision.fp8_products)
        raise ConfigError("precision.fp8_products", None, f"names {named}, of which this model has none")
    for index, layer in model.layers.items():
        for name, info in registry(layer).items():
            products = info.role.products
            if not precision.in_float8(products, int(index), layers):
                continue
            rows, width = specs[f"layers.{index}.{name}"].computed.shape[-2:]
            if rows % recipe.multiple or width % recipe.multiple:
                what = f"the {info.role.value} of layer {index} is {rows} x {width} on a rank"
                advice = "change the model's widths or the degrees of parallel, or leave it out"
                reason = f"{what}, but {recipe.value} takes multiples of {recipe.multiple}: {advice}"
                raise ConfigError(
                    "precision.fp8_products", products, reason, [_without(precision.fp8_products, products)]
                )


def _without(chosen: list[Products], one: Products | None) -> str:
    return f"[{','.join(products.value for products in chosen if products is not one)}]"


def _narrow(model: Transformer, specs: dict[str, ShardSpec], precision: PrecisionConfig) -> None:
    """What the model computes with where the engine keeps master weights of its own, in the formats in which FSDP2
    gathers: bf16 for bf16 products, but routers as wide as the masters.
    """
    if precision.compute_dtype is torch.bfloat16:
        for name, parameter in model.named_parameters():
            if specs[name].info.role is not Role.router:
                parameter.data = parameter.data.to(torch.bfloat16)


def _cut(model: Transformer, specs: dict[str, ShardSpec]) -> None:
    """Replace each parameter by one of the shape that this rank computes with."""
    for name, parameter in list(model.named_parameters()):
        if specs[name].splits:
            owner, _, attribute = name.rpartition(".")
            part = torch.empty(specs[name].computed.shape, dtype=parameter.dtype, device=parameter.device)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(part))


def _count_whole_rows(model: Transformer, meshes: Meshes) -> None:
    """Balancing terms of a whole row need the counts of all ranks that have a part of it."""
    axes = [axis for axis in (meshes.cp, meshes.tp) if axis.size > 1]

    def over_all(counts_BE: Tensor) -> None:
        for axis in axes:
            axis.sum(counts_BE, "balance")

    for layer in model.layers.values():
        if isinstance(layer.ffn, MixtureOfExperts):
            layer.ffn.router.balance.sum_over_sequence = over_all
