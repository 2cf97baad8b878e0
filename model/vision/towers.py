"""Two towers for contrastive training: the vision encoder and a causal text decoder, one feature for each pair's side.

Parallelism shards the towers from outside; nothing in this file knows of ranks.

Shapes: B pairs, Q image tokens of a tile, T sequence, D hidden size, E feature size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError
from model.config import FeedForward, ModelConfig
from model.head import Head
from model.init import initialise
from model.layers import Embedding, RMSNorm
from model.roles import Role
from model.transformer import Layer, Stack, Transformer, set_rope_config
from model.vision.encoder import VisionEncoder
from precision.gemm import widened
from precision.resolve import Precision

LARGEST_LOG_SCALE = math.log(100)
"""Limit of the learnt log-scale, as in CLIP (Radford et al. 2021, section 2.5)."""


class ContrastiveTowers(nn.Module):
    """Maps tiles and captions to features of unit length, in at least float32.

    The image feature is the mean of the encoder's rows, whose projector has the width E. The text feature is that of a
    caption's last token: a causal decoder has read the whole caption there. Parameters of the encoder have the names
    that they have in a `Transformer`, so that its decoder can be trained on the same encoder later.

    `log_scale` and `bias`, of one element each, turn cosines into logits: exp(log_scale) * cosine + bias. The arguments
    are their initial values; `bias=None` adds none. Raises `ConfigError` for a model without an encoder or with
    MoE layers, whose balancing sums would be counted twice by `backward_in_parts`.
    """

    def __init__(
        self, config: ModelConfig, feature_size: int, precision: Precision, log_scale: float, bias: float | None = None
    ) -> None:
        super().__init__()
        if config.vision is None:
            raise ConfigError("model.vision", None, "a contrastive model needs a vision encoder", ["+model.vision={}"])
        if any(layer.feed_forward is FeedForward.moe for layer in config.blocks):
            reason = "the text tower of a contrastive model has dense layers only"
            raise ConfigError("model.moe_every", config.moe_every, reason, [0])
        dtype, ends, count = precision.compute_dtype, precision.plain, len(config.blocks)
        self.clock = precision.clock
        self.config, self.compute_dtype = config, dtype
        self.vision = VisionEncoder(config.vision, feature_size, ends, dtype)
        self.text = Stack(
            Embedding(config.vocab_size, config.hidden_size, dtype),
            {str(i): Layer(config, layer, precision.at(i, count)) for i, layer in enumerate(config.blocks)},
            RMSNorm(config.hidden_size, config.norm_eps, Role.final_norm, precision.plain),
            Head(config.hidden_size, feature_size, Role.head, ends),
        )
        self.log_scale, self.bias = nn.Parameter(torch.empty(1)), None
        self.roles, self.constants = {"log_scale": Role.logit_scale}, {"log_scale": log_scale}
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(1))
            self.roles["bias"], self.constants["bias"] = Role.logit_bias, bias

    @property
    def layers(self) -> nn.ModuleDict:
        """The layers of the text decoder."""
        return self.text.layers

    def initialise(self, seed: int) -> None:
        """Fill all parameters, as a pure function of the seed, their name and index."""
        initialise(self, self.config, seed)

    def set_rope_config(self, config: ModelConfig) -> None:
        """Set the rotary and temperature settings to those of `config`, which must have the same parameters."""
        set_rope_config(self, config)

    def image_features(self, tiles_B3SS: Tensor) -> Tensor:
        """Return features [B, E] of images of one tile each."""
        rows = self.vision(tiles_B3SS)
        return F.normalize(widened(rows).unflatten(0, (len(tiles_B3SS), -1)).mean(1), dim=-1)

    def text_features(self, tokens_BT: Tensor, last_B: Tensor) -> Tensor:
        """Return features [B, E] of captions. `last_B`: index of each caption's last token; what follows is padding,
        which a causal decoder does not see.
        """
        # a sum with a mask: the backward pass of an index is not deterministic
        is_last_BT = torch.arange(tokens_BT.shape[1], device=last_B.device) == last_B[:, None]
        rows_BTE = widened(self.text(tokens_BT))
        return F.normalize((rows_BTE * is_last_BT[..., None]).sum(1), dim=-1)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Bring the log-scale back below its limit. Call it after each optimizer step."""
        self.log_scale.clamp_(max=LARGEST_LOG_SCALE)


Network = Transformer | ContrastiveTowers
"""What a run trains."""
