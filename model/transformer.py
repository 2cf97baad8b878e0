"""Pre-norm decoder: embedding, layers of attention and feed-forward, final norm and head.

Shapes: B batch, T sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from core.errors import DataError
from model.attention.latent import LatentAttention
from model.attention.layer import Attention
from model.attention.plan import ForwardContext
from model.config import FeedForward, LayerConfig, ModelConfig
from model.head import Head, TiedHead
from model.layers import Embedding, GatedMLP, RMSNorm
from model.moe import MixtureOfExperts
from model.roles import Role
from model.vision.encoder import VisionEncoder
from model.vision.fusion import EncodedImages, images_of, no_images, place
from precision.resolve import LayerGemms, Precision


class Layer(nn.Module):
    """h = x + m * attention(norm(x)); h + m * ffn(norm(h)), with m = `multipliers.residual`."""

    def __init__(self, model: ModelConfig, layer: LayerConfig, gemms: LayerGemms) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps, Role.block_norm, gemms)
        self.attention = (Attention if model.latent is None else LatentAttention)(model, layer, gemms)
        self.ffn_norm = RMSNorm(model.hidden_size, model.norm_eps, Role.block_norm, gemms)
        self.is_moe = layer.feed_forward is FeedForward.moe
        self.multiplier = model.multipliers.residual
        roles = (Role.dense_gate, Role.dense_up, Role.dense_down)
        self.ffn = (
            MixtureOfExperts(model, gemms)
            if self.is_moe
            else GatedMLP(model.hidden_size, model.dense_hidden_size, roles, gemms)
        )

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        h_BTD, z_BTD = self.attend(x_BTD, context)
        y_BTD = self.ffn(z_BTD, context) if self.is_moe else self.ffn(z_BTD)
        return h_BTD.add(y_BTD, alpha=self.multiplier)

    def attend(self, x_BTD: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Return the hidden states after attention, and the input of the feed-forward part."""
        y_BTD = self.attention(self.attention_norm(x_BTD), context)
        h_BTD = x_BTD.add(y_BTD, alpha=self.multiplier)  # torch.compile cannot resume inside a call of a builtin
        return h_BTD, self.ffn_norm(h_BTD)


class Stack(nn.Module):
    """Consecutive layers of a decoder, with the embedding or the head if they include its first or last layer.

    Without an embedding, the input is hidden states [B, T, D] instead of token ids. Without a head, the output is
    hidden states. Layers keep their index in the whole model, and so their parameter names.
    """

    def __init__(
        self,
        embedding: Embedding | None,
        layers: dict[str, Layer],
        final_norm: RMSNorm | None,
        head: Head | TiedHead | None,
        vision: VisionEncoder | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.vision = vision
        self.layers = nn.ModuleDict(layers)
        self.final_norm = final_norm
        self.head = head

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Map token ids [B, T] to logits [B, T, V], or [B, 1, V] with `context.last_B`, or to the losses [B, T] of
        `context.labels_BT`, [B, T, 2] with `context.likeliest`. Without a context, each sequence is one document.
        """
        context = context or _one_document(x)
        x_BTD = x if self.embedding is None else self._embed(x, self.embedding, context)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, context)
        if self.head is None or self.final_norm is None:
            return x_BTD
        if context.last_B is not None:
            x_BTD = x_BTD.take_along_dim(context.last_B[:, None, None], 1)
        return self.head(self.final_norm(x_BTD), context.labels_BT, context.likeliest)

    def _embed(self, tokens_BT: Tensor, embedding: Embedding, context: ForwardContext) -> Tensor:
        x_BTD = embedding(tokens_BT)
        images = context.images
        if images is None and context.cache is not None:
            return x_BTD
        if self.vision is not None:
            images = images or no_images(self.vision.config, x_BTD)
            return place(x_BTD, images.encode(self.vision), images.rows_BT)
        return place(x_BTD, images.rows_MD, images.rows_BT) if isinstance(images, EncodedImages) else x_BTD


class Transformer(Stack):
    """Maps token ids [B, T] to logits [B, T, V]. Weights are uninitialised: see `model.init`."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        embedding = Embedding(config.vocab_size, config.hidden_size, precision.compute_dtype)
        blocks, ends = config.blocks, precision.plain
        super().__init__(
            embedding,
            {str(i): Layer(config, layer, precision.at(i, len(blocks))) for i, layer in enumerate(blocks)},
            RMSNorm(config.hidden_size, config.norm_eps, Role.final_norm, ends, config.multipliers.logits),
            TiedHead(embedding, ends)
            if config.tie_embeddings
            else Head(config.hidden_size, config.vocab_size, Role.head, ends),
            None
            if config.vision is None
            else VisionEncoder(config.vision, config.hidden_size, ends, precision.compute_dtype),
        )
        self.config = config
        self.compute_dtype, self.clock = precision.compute_dtype, precision.clock
        self.attention = precision.attention

    def forward(self, x: Tensor, context: ForwardContext | None = None, pixels: Tensor | None = None) -> Tensor:
        """Map token ids [B, T] to logits [B, T, V]. Without a context, each sequence is one document.

        `pixels` [N, 3, S, S]: normalised tiles, in the order of their placeholders. Raises `DataError` if they do not
        fit the placeholders.
        """
        context = context or _one_document(x)
        if pixels is not None:
            if self.vision is None:
                raise DataError("the model has no vision encoder, so it takes no pixels")
            context.images = images_of(self.vision.config, x, pixels)
        return super().forward(x, context)

    def set_rope_config(self, config: ModelConfig) -> None:
        """Set the rotary and temperature settings to those of `config`, which must have the same parameters."""
        set_rope_config(self, config)


class RotaryModel(Protocol):
    """A network with the layers of a decoder."""

    config: ModelConfig

    @property
    def layers(self) -> nn.ModuleDict: ...


def set_rope_config(model: RotaryModel, config: ModelConfig) -> None:
    """Set the rotary and temperature settings of a model's layers."""
    if config == model.config:
        return
    model.config = config
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        layer.attention.model = config


def _one_document(x: Tensor) -> ForwardContext:
    """Return the context of sequences of one document each."""
    return ForwardContext(torch.arange(x.shape[1]).expand(x.shape[:2]), x.device)
