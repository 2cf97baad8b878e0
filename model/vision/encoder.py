"""Llama 4's vision encoder: tiles of an image to rows of the decoder's width.

A tile is cut into patches. A vision transformer with two-dimensional rotary positions encodes them, a pixel shuffle
joins squares of 2 x 2 patches, and an adapter and a projector map the result to the decoder's width.

Shapes: N tiles, S side of a tile in pixels, P patches of a tile, C encoder width, H heads, K head dim, Q image tokens
of a tile, D decoder width, M = N * Q image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.rope import cos_and_sin, frequencies, rotate
from model.layers import Linear
from model.roles import Role
from model.vision.config import CHANNELS, SHUFFLE, VisionConfig
from precision.resolve import LayerGemms


class BiasedLinear(Linear):
    """y = x W^T + b; weight [F, D], bias [F]."""

    def __init__(self, in_size: int, out_size: int, role: Role, gemms: LayerGemms) -> None:
        super().__init__(in_size, out_size, role, gemms)
        self.bias = nn.Parameter(torch.empty(out_size))
        self.roles |= {"bias": Role.vision_bias}

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TF = super().forward(x_TD)
        return y_TF + self.bias.to(y_TF.dtype)


class LayerNorm(nn.Module):
    """Layer norm with gain and bias (Ba et al. 2016), computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(size)) for _ in range(2))
        self.roles = {"weight": Role.vision_norm, "bias": Role.vision_bias}
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class VisionAttention(nn.Module):
    """Attention among all patches of a tile, without a mask."""

    def __init__(self, config: VisionConfig, gemms: LayerGemms) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.query = BiasedLinear(size, size, Role.vision_query, gemms)
        self.key = BiasedLinear(size, size, Role.vision_key, gemms)
        self.value = BiasedLinear(size, size, Role.vision_value, gemms)
        self.output = BiasedLinear(size, size, Role.vision_output, gemms)

    def forward(self, x_NPC: Tensor, rotation_1P1K2: Tensor) -> Tensor:
        q, k, v = (part(x_NPC).unflatten(-1, (-1, self.head_dim)) for part in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotation_1P1K2), rotate(k, rotation_1P1K2), v))
        # flash attention on CUDA refuses an empty batch (pytorch/pytorch#133780); the sum is empty as well
        y_NHPK = F.scaled_dot_product_attention(q, k, v) if len(x_NPC) else q + k + v
        return self.output(y_NHPK.transpose(1, 2).flatten(-2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, gemms: LayerGemms) -> None:
        super().__init__()
        self.up = BiasedLinear(config.hidden_size, config.mlp_hidden_size, Role.vision_up, gemms)
        self.down = BiasedLinear(config.mlp_hidden_size, config.hidden_size, Role.vision_down, gemms)

    def forward(self, x_NPC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_NPC)))


class VisionLayer(nn.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def __init__(self, config: VisionConfig, gemms: LayerGemms) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config, gemms)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = VisionMLP(config, gemms)

    def forward(self, x_NPC: Tensor, rotation_1P1K2: Tensor) -> Tensor:
        h_NPC = x_NPC + self.attention(self.attention_norm(x_NPC), rotation_1P1K2)
        return h_NPC + self.mlp(self.mlp_norm(h_NPC))


class VisionEncoder(nn.Module):
    """Encodes tiles [N, 3, S, S], normalised to [-1, 1], as rows [N * Q, D] for the decoder.

    The class token is the last one, and is dropped: it serves as a register only. An empty batch (N = 0) gives no rows
    and gradients of zero, so that ranks without images take part in the same collectives.
    """

    def __init__(self, config: VisionConfig, decoder_size: int, gemms: LayerGemms, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.patch = Linear(config.patch_values, config.hidden_size, Role.vision_patch, gemms)
        self.class_token = nn.Parameter(torch.empty(config.hidden_size))
        self.positions = nn.Parameter(torch.empty(config.patches + 1, config.hidden_size))
        self.roles = dict.fromkeys(("class_token", "positions"), Role.vision_position)
        self.first_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleDict({str(i): VisionLayer(config, gemms) for i in range(config.num_layers)})
        self.last_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.adapter_in = Linear(config.shuffled_size, config.adapter_hidden_size, Role.adapter_in, gemms)
        self.adapter_out = Linear(config.adapter_hidden_size, config.adapter_hidden_size, Role.adapter_out, gemms)
        self.projector = Linear(config.adapter_hidden_size, decoder_size, Role.projector, gemms)

    def forward(self, tiles_N3SS: Tensor) -> Tensor:
        x_NPC = self.patch(patches(tiles_N3SS.to(self.dtype), self.config.patch_size))
        last_N1C = self.class_token.to(x_NPC.dtype).expand(len(x_NPC), 1, -1)
        x_NPC = torch.cat([x_NPC, last_N1C], dim=1) + self.positions.to(x_NPC.dtype)
        x_NPC = self.first_norm(x_NPC)
        rotation_1P1K2 = tile_rotation(self.config, x_NPC.device, x_NPC.dtype)
        for layer in self.layers.values():
            x_NPC = layer(x_NPC, rotation_1P1K2)
        x_NPC = self.last_norm(x_NPC)[:, :-1]
        x_NQA = F.gelu(self.adapter_in(pixel_shuffle(x_NPC, self.config.patches_per_side)))
        # flattened before the matmul: FSDP2 warns of a module that returns a view
        return self.projector(F.gelu(self.adapter_out(x_NQA)).flatten(0, 1))


def patches(tiles_N3SS: Tensor, size: int) -> Tensor:
    """Cut tiles into patches of `size` pixels: [N, P, 3 * size^2], each ordered by channel, row and column."""
    side = tiles_N3SS.shape[-1] // size
    grid = tiles_N3SS.reshape(len(tiles_N3SS), CHANNELS, side, size, side, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(len(tiles_N3SS), side * side, CHANNELS * size * size)


def pixel_shuffle(x_NPC: Tensor, side: int) -> Tensor:
    """Join each square of 2 x 2 patches, row by row, to one token: [N, P, C] -> [N, P / 4, 4 * C]."""
    n, _, c = x_NPC.shape
    half = side // SHUFFLE
    squares = x_NPC.reshape(n, half, SHUFFLE, half, SHUFFLE, c).transpose(2, 3)
    return squares.reshape(n, half * half, c * SHUFFLE**2)


def tile_rotation(config: VisionConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the rotary factors of the patches and the class token, complex [1, P + 1, 1, K / 2].

    The first half of a head's pairs is rotated by the column, the second half by the row, both counted from 1. The
    class token is not rotated.
    """
    side = config.patches_per_side
    place = torch.arange(config.patches, device=device)
    turns = frequencies(config.head_dim // 2, config.rope_theta, device=device)
    angles = torch.cat([(xy + 1)[:, None] * turns for xy in (place % side, place // side)], dim=1)
    angles = F.pad(angles, (0, 0, 0, 1))[None, :, None]
    # complex, since FSDP2 and ZeRO-3 would cast a real argument of a layer to bfloat16
    return torch.view_as_complex(cos_and_sin(angles, dtype))
