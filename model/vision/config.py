"""Sizes of the vision encoder. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError, check_numbers

SHUFFLE = 2
"""Patches per side of a square that becomes one image token: pixel shuffle with ratio 1/2."""
CHANNELS = 3


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder with its adapter; the defaults are those of Llama 4 Scout and Maverick."""

    hidden_size: int = 1408
    """Width of the encoder."""
    num_layers: int = 34
    """Number of encoder layers."""
    num_heads: int = 16
    """Number of attention heads, a divisor of `hidden_size`. The width of a head is a multiple of 4."""
    mlp_hidden_size: int = 5632
    """Hidden size of the encoder's feed-forward layers."""
    adapter_hidden_size: int = 4096
    """Width of the adapter between encoder and decoder."""
    tile_size: int = 336
    """Side of a tile in pixels, a multiple of 2 * `patch_size`."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies of rows and columns."""
    image_token_id: int = 200092
    """Token id of a placeholder, `<|patch|>`. The encoder's output replaces the embeddings of placeholders."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "mlp_hidden_size", "adapter_hidden_size", "tile_size")
        check_numbers(self, (*sizes, "patch_size", "norm_eps", "rope_theta"), ("image_token_id",))
        if self.hidden_size % (4 * self.num_heads):
            reason = f"must be a multiple of 4 * {self.num_heads} heads: the rotation acts on pairs of rows and columns"
            raise ConfigError("hidden_size", self.hidden_size, reason)
        if self.tile_size % (SHUFFLE * self.patch_size):
            reason = f"must be a multiple of {SHUFFLE * self.patch_size}, {SHUFFLE} patches"
            raise ConfigError("tile_size", self.tile_size, reason)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches per tile."""
        return self.patches_per_side**2

    @property
    def patch_values(self) -> int:
        """Values of a patch: channels times pixels."""
        return CHANNELS * self.patch_size**2

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens per tile, which take positions in the decoder."""
        return self.patches // SHUFFLE**2

    @property
    def shuffled_size(self) -> int:
        """Width after the pixel shuffle, the adapter's input."""
        return self.hidden_size * SHUFFLE**2
