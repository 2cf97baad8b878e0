"""Compare the vision encoder with transformers' (attention by SDPA): forward and backward, one thread, float32.

Weights are equal on both sides, and outputs and the patches' gradients are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Result, interleaved, median_ratio, spread
from model.huggingface.vision import vision_locations, write_vision
from model.vision.config import CHANNELS, VisionConfig
from model.vision.encoder import VisionEncoder
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

SMALL = VisionConfig(128, 3, 4, 512, 128, 112, 14)
WIDE = VisionConfig(num_layers=2)
CASES = {
    "smoke model's, 16 tiles": (SMALL, 128, 16, 41),
    "Scout's with 2 of 34 layers, 1 tile": (WIDE, 5120, 1, 7),
}
"""For each encoder its sizes, the decoder's width, the number of tiles and of rounds."""
LIMIT = 1.1


def ours(config: VisionConfig, width: int) -> VisionEncoder:
    encoder = VisionEncoder(config, width, resolve(PrecisionConfig(Compute.float32)).plain, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        nn.init.normal_(parameter, std=scale, generator=generator)
    for name, parameter in encoder.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
    return encoder


class TheirEncoder(nn.Module):
    """transformers' encoder with its projector."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        import transformers
        from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionModel

        super().__init__()
        sizes: Any = write_vision(config)["vision_config"]
        whole: Any = transformers.Llama4Config(vision_config=sizes, text_config={"hidden_size": width})
        whole.vision_config._attn_implementation = "sdpa"
        self.vision_model: Any = Llama4VisionModel(whole.vision_config)
        self.multi_modal_projector = Llama4MultiModalProjector(whole)

    def forward(self, tiles_N3SS: Tensor) -> Tensor:
        return self.multi_modal_projector(self.vision_model(tiles_N3SS).last_hidden_state).flatten(0, 1)


def theirs(config: VisionConfig, encoder: VisionEncoder, width: int) -> TheirEncoder:
    """Return transformers' encoder with copies of our weights."""
    with torch.device("meta"):
        found = TheirEncoder(config, width)
    found.to_empty(device="cpu")
    found.vision_model.rotary_embedding = type(found.vision_model.rotary_embedding)(found.vision_model.config)
    places = vision_locations(config)
    state = {places[f"vision.{name}"].name: parameter.detach() for name, parameter in encoder.named_parameters()}
    found.load_state_dict(state)
    return found


def step(module: nn.Module, tiles_N3SS: Tensor, gradient_MD: Tensor) -> Callable[[], None]:
    def forward_backward() -> None:
        module(tiles_N3SS).backward(gradient_MD)
        for parameter in module.parameters():
            parameter.grad = None

    return forward_backward


def assert_equal(encoder: VisionEncoder, other: TheirEncoder, tiles_N3SS: Tensor, gradient_MD: Tensor) -> None:
    rows = [module(tiles_N3SS) for module in (encoder, other)]
    for one in rows:
        one.backward(gradient_MD)
    weights = encoder.patch.weight, other.vision_model.patch_embedding.linear.weight
    for a, b in (rows, [weight.grad for weight in weights]):
        worst = ((a - b).abs().max() / b.abs().max()).item()
        if not worst <= 1e-4:
            raise AssertionError(f"the encoders differ by {worst:.1e} of the largest value: their times say nothing")


def measured(name: str, config: VisionConfig, width: int, tiles: int, rounds: int) -> Result:
    generator = torch.Generator().manual_seed(1)
    tiles_N3SS = torch.rand(tiles, CHANNELS, config.tile_size, config.tile_size, generator=generator) * 2 - 1
    gradient_MD = torch.randn(tiles * config.tokens_per_tile, width, generator=generator)
    encoder = ours(config, width)
    other = theirs(config, encoder, width)
    assert_equal(encoder, other, tiles_N3SS, gradient_MD)
    sides = [step(module, tiles_N3SS, gradient_MD) for module in (encoder, other)]
    a, b = interleaved(sides, rounds, clock=time.process_time)
    ratio = median_ratio(a, b)
    note = f"CPU seconds of one thread, median of {rounds} pairs, spread {spread(a):.0%}"
    title = f"vision encoder vs transformers SDPA, {name} (s)"
    return Result(title, statistics.median(a), statistics.median(b), ratio, f"<= {LIMIT}", ratio <= LIMIT, note)


def run() -> list[Result]:
    torch.set_num_threads(1)
    return [measured(name, *case) for name, case in CASES.items()]
