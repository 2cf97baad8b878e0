"""Where each of our parameters lies among the tensors of a family's files.

Attention, norms, embeddings and dense layers are named alike in all families; they differ in their mixtures. Ours are
[E, out, in] with gate and up apart. Llama 4 stores [E, in, out] with gate and up side by side; the others one [out, in]
matrix per expert.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from model.config import FeedForward, LayerConfig, ModelConfig, QKNorm


@dataclass(frozen=True)
class Location:
    """`name` with "{expert}" in it stands for one tensor per expert; a 3-D parameter without it is stacked.

    `transposed`: the matrix is stored [in, out]. It is then the `part`-th of `parts` side by side along the last
    dimension.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor(s) for a parameter of `shape`."""
        if len(shape) == 1:
            return shape
        *experts, rows, columns = shape
        matrix = (columns, rows * self.parts) if self.transposed else (rows, columns)
        return matrix if "{expert}" in self.name else (*experts, *matrix)


@dataclass(frozen=True)
class MixtureNames:
    """How a family spells its feed-forward layers."""

    block: str
    """Of a mixture layer, below the layer."""
    router: str
    expert: tuple[str, str, str]
    """Gate, up and down of one expert, below `experts.{expert}`."""
    dense: str = "mlp"
    fused: bool = False
    """Whether experts may be stacked as Llama 4 does."""


def locations(model: ModelConfig, names: MixtureNames, available: Collection[str]) -> dict[str, Location]:
    """Parameter -> location. `available`: the names in the files, which tell a prefix and fused from unfused experts;
    empty for a checkpoint yet to be written.
    """
    prefix = "language_model." if any(name.startswith("language_model.") for name in available) else ""
    found = {
        "embedding.weight": Location(f"{prefix}model.embed_tokens.weight"),
        "final_norm.weight": Location(f"{prefix}model.norm.weight"),
        "head.weight": Location(f"{prefix}lm_head.weight"),
    }
    for index, layer in enumerate(model.blocks):
        theirs, ours = f"{prefix}model.layers.{index}", f"layers.{index}"
        found |= _attention(theirs, ours, layer)
        if layer.feed_forward is FeedForward.dense:
            found |= {
                f"{ours}.ffn.{part}.weight": Location(f"{theirs}.{names.dense}.{part}_proj.weight")
                for part in ("gate", "up", "down")
            }
        else:
            found |= _mixture(f"{theirs}.{names.block}", f"{ours}.ffn", model, names, available)
    return found


def _attention(theirs: str, ours: str, layer: LayerConfig) -> dict[str, Location]:
    found = {
        f"{ours}.attention_norm.weight": Location(f"{theirs}.input_layernorm.weight"),
        f"{ours}.ffn_norm.weight": Location(f"{theirs}.post_attention_layernorm.weight"),
    }
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        found[f"{ours}.attention.{part}.weight"] = Location(f"{theirs}.self_attn.{letter}_proj.weight")
        if part in ("query", "key") and layer.qk_norm in (QKNorm.per_head, QKNorm.full):
            found[f"{ours}.attention.{part}_norm.weight"] = Location(f"{theirs}.self_attn.{letter}_norm.weight")
    return found


def _mixture(
    theirs: str, ours: str, model: ModelConfig, names: MixtureNames, available: Collection[str]
) -> dict[str, Location]:
    found = {f"{ours}.router.weight": Location(f"{theirs}.{names.router}")}
    stacked = f"{theirs}.experts.gate_up_proj"
    if names.fused and (not available or stacked in available):
        found |= {
            f"{ours}.experts.gate.weight": Location(stacked, transposed=True, part=0, parts=2),
            f"{ours}.experts.up.weight": Location(stacked, transposed=True, part=1, parts=2),
            f"{ours}.experts.down.weight": Location(f"{theirs}.experts.down_proj", transposed=True),
        }
    else:
        found |= {
            f"{ours}.experts.{part}.weight": Location(f"{theirs}.experts.{{expert}}.{name}.weight")
            for part, name in zip(("gate", "up", "down"), names.expert, strict=True)
        }
    if model.shared_expert_width:
        found |= {
            f"{ours}.shared.{part}.weight": Location(f"{theirs}.shared_expert.{part}_proj.weight")
            for part in ("gate", "up", "down")
        }
    return found
