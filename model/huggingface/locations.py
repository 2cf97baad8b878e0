"""Map each of our parameters to tensors in a family's files.

Attention, norms, embeddings and dense layers have the same names in all families; names of MoE layers differ. E experts
of hidden size F are [E, 2, F, D] (gate, then up) and [E, D, F] here. Llama 4 stores them as [E, in, out], with gate and
up concatenated along out. The other families have an [out, in] matrix per expert and projection.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from model.config import FeedForward, LatentConfig, LayerConfig, ModelConfig, QKNorm

NESTED = "language_model."
"""Prefix of the decoder's tensors in a checkpoint with a vision encoder."""


@dataclass(frozen=True)
class Location:
    """Where a parameter is stored. `name` may have the placeholders "{expert}" and "{half}", and then stands for a
    tensor per expert and half. `halves`: the names of gate and up.

    If `transposed`, all experts are in one tensor [E, in, out], with the halves concatenated along out.
    """

    name: str
    transposed: bool = False
    halves: tuple[str, ...] = ()

    def tensor(self, expert: int = 0, half: int = 0) -> str:
        """Return the name of the stored tensor that holds this expert's matrix."""
        return self.name.format(expert=expert, half=self.halves[half] if self.halves else "")

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each stored tensor of a parameter of `shape`."""
        if len(shape) < 3:
            return shape
        if not self.transposed:
            return shape[-2:]
        return shape[0], shape[-1], shape[-2] * (shape[1] if len(shape) == 4 else 1)

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """Return the names of all stored tensors of a parameter of `shape`, in its order."""
        experts = range(shape[0]) if "{expert}" in self.name else range(1)
        return [self.tensor(expert, half) for expert in experts for half in range(max(1, len(self.halves)))]


@dataclass(frozen=True)
class MoENames:
    """A family's names of the parts of feed-forward layers."""

    block: str
    """Name of the MoE part of a layer, below the layer."""
    router: str
    expert: tuple[str, str, str]
    """Names of gate, up and down of one expert, below `experts.{expert}`."""
    dense: str = "mlp"
    shared: str = "shared_expert"
    bias: str | None = None
    """Name of the router's selection bias; None: the family has none."""
    fused: bool = False
    """Whether experts may be stacked in one tensor, as in Llama 4."""


def locations(model: ModelConfig, names: MoENames, available: Collection[str]) -> dict[str, Location]:
    """Return the location of each parameter. `available`: the tensor names in the files, which show the prefix
    of all names and whether experts are fused; empty for a checkpoint that is yet to be written.
    """
    nested = model.vision is not None if not available else any(name.startswith(NESTED) for name in available)
    prefix = NESTED if nested else ""
    found = {
        "embedding.weight": Location(f"{prefix}model.embed_tokens.weight"),
        "final_norm.weight": Location(f"{prefix}model.norm.weight"),
        "head.weight": Location(f"{prefix}lm_head.weight"),
    }
    for index, layer in enumerate(model.blocks):
        theirs, ours = f"{prefix}model.layers.{index}", f"layers.{index}"
        found |= _attention(theirs, ours, layer, model.latent)
        if layer.feed_forward is FeedForward.dense:
            found |= {
                f"{ours}.ffn.{part}.weight": Location(f"{theirs}.{names.dense}.{part}_proj.weight")
                for part in ("gate", "up", "down")
            }
        else:
            found |= _moe(f"{theirs}.{names.block}", f"{ours}.ffn", model, names, available)
    return found


def _attention(theirs: str, ours: str, layer: LayerConfig, latent: LatentConfig | None) -> dict[str, Location]:
    found = {
        f"{ours}.attention_norm.weight": Location(f"{theirs}.input_layernorm.weight"),
        f"{ours}.ffn_norm.weight": Location(f"{theirs}.post_attention_layernorm.weight"),
    }
    if latent is not None:
        for part, name in _latent_parts(latent).items():
            found[f"{ours}.attention.{part}.weight"] = Location(f"{theirs}.self_attn.{name}.weight")
        return found
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        found[f"{ours}.attention.{part}.weight"] = Location(f"{theirs}.self_attn.{letter}_proj.weight")
        if part in ("query", "key") and layer.qk_norm in (QKNorm.per_head, QKNorm.full):
            found[f"{ours}.attention.{part}_norm.weight"] = Location(f"{theirs}.self_attn.{letter}_norm.weight")
    return found


def _latent_parts(latent: LatentConfig) -> dict[str, str]:
    found = {"latent_down": "kv_a_proj_with_mqa", "latent_norm": "kv_a_layernorm", "latent_up": "kv_b_proj"}
    found |= {"output": "o_proj"}
    if latent.query_rank is None:
        return found | {"query": "q_proj"}
    return found | {"query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query_up": "q_b_proj"}


def bias_locations(model: ModelConfig, names: MoENames) -> dict[str, str]:
    """Return the stored names of the routers' selection biases, by buffer name. Empty if the model uses none."""
    if names.bias is None or not model.router.selection_bias:
        return {}
    return {
        f"layers.{index}.ffn.router.balance.bias_E": f"model.layers.{index}.{names.block}.{names.bias}"
        for index, layer in enumerate(model.blocks)
        if layer.feed_forward is FeedForward.moe
    }


def _moe(
    theirs: str, ours: str, model: ModelConfig, names: MoENames, available: Collection[str]
) -> dict[str, Location]:
    found = {f"{ours}.router.weight": Location(f"{theirs}.{names.router}")}
    stacked = f"{theirs}.experts.gate_up_proj"
    gate, up, down = names.expert
    if names.fused and (not available or stacked in available):
        found[f"{ours}.experts.gate_up.weight"] = Location(stacked, transposed=True)
        found[f"{ours}.experts.down.weight"] = Location(f"{theirs}.experts.down_proj", transposed=True)
    else:
        one = f"{theirs}.experts.{{expert}}"
        found[f"{ours}.experts.gate_up.weight"] = Location(f"{one}.{{half}}.weight", halves=(gate, up))
        found[f"{ours}.experts.down.weight"] = Location(f"{one}.{down}.weight")
    if model.shared_hidden_size:
        found |= {
            f"{ours}.shared.{part}.weight": Location(f"{theirs}.{names.shared}.{part}_proj.weight")
            for part in ("gate", "up", "down")
        }
    return found
