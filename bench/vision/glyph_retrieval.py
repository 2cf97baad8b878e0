"""Train contrastive towers on characters and their Unicode names: `python -m bench.vision.glyph_retrieval [--steps N]`.

Each held-out picture is to be found among the names of all of them, and each name among the pictures. Names that
several pictures have count once. Of the held-out characters, training has seen 93%, in another size, place, face or
colour.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from data.images.decode import decode
from data.images.generated.glyphs import GlyphConfig, glyph
from model.config import InitConfig, ModelConfig
from model.vision.config import VisionConfig
from model.vision.towers import ContrastiveTowers
from parallel.mesh import MeshAxis
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from train.contrastive.grad_cache import backward_in_parts
from train.contrastive.loss import ContrastiveLoss, contrastive_loss

SIDE, TOKENS, PAIRS, WIDTH = 32, 32, 96, 64
TRAINED, HELD_OUT, WARMUP, RATE = 20_000, 400, 50, 3e-3
VISION = VisionConfig(
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=4,
    mlp_hidden_size=192,
    adapter_hidden_size=128,
    tile_size=SIDE,
    patch_size=8,
    image_token_id=1,
)
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    dense_hidden_size=128,
    moe_every=0,
    attention_chunk_size=None,
    vision=VISION,
    init=InitConfig(std=1.0, fan_in=True),
)
GlyphPairs = tuple[Tensor, Tensor, Tensor]
"""Tiles [B, 3, S, S], the bytes of names [B, T], and the index of each name's last byte."""


def glyph_pairs(numbers: Iterable[int], unique: bool = False) -> GlyphPairs:
    """Return pictures with the first bytes of their names. `unique`: the first picture of each name only."""
    tiles, tokens, last, seen = [], [], [], set[bytes]()
    for number in numbers:
        png, name = glyph(number, GlyphConfig(size=SIDE))
        text = name.encode()[:TOKENS]
        if unique and text in seen:
            continue
        seen.add(text)
        tiles.append(np.asarray(decode(png, str(number), SIDE * SIDE)))
        tokens.append(list(text.ljust(TOKENS)))
        last.append(len(text) - 1)
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor(tokens), torch.tensor(last)


def train(towers: ContrastiveTowers, kind: ContrastiveLoss, steps: int, parts: int) -> float:
    """Train, and return the last loss."""
    pairs, axis = glyph_pairs(range(TRAINED)), MeshAxis("dp")
    optimizer = torch.optim.AdamW(towers.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator, value = torch.Generator().manual_seed(0), torch.tensor(math.nan)

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return contrastive_loss(kind, images, texts, towers.log_scale, towers.bias, axis)

    for _ in range(steps):
        chosen = torch.randint(TRAINED, (PAIRS,), generator=generator)
        optimizer.zero_grad()
        batch = [side[chosen].chunk(parts) for side in pairs]
        value = backward_in_parts(list(zip(*batch, strict=True)), lambda one: features(towers, one), loss)
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        towers.limit_scale()
    return value.item()


def features(towers: ContrastiveTowers, pairs: GlyphPairs) -> tuple[Tensor, Tensor]:
    return towers.image_features(pairs[0]), towers.text_features(*pairs[1:])


@torch.no_grad()
def retrieval(towers: ContrastiveTowers, pairs: GlyphPairs) -> tuple[float, float]:
    """Return the shares of pictures whose name is the nearest of all names, and of names whose picture is."""
    images, texts = features(towers, pairs)
    cosines, own = images @ texts.T, torch.arange(len(images))
    to_texts, to_images = ((cosines.argmax(dim) == own).double().mean().item() for dim in (1, 0))
    return to_texts, to_images


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--loss", choices=[kind.name for kind in ContrastiveLoss], default="info_nce")
    parser.add_argument("--micro-batches", type=int, default=1)
    given = parser.parse_args(arguments)
    kind = ContrastiveLoss[given.loss]
    towers = ContrastiveTowers(
        MODEL, WIDTH, resolve(PrecisionConfig(Compute.float32)), kind.first.log_scale, kind.first.bias
    )
    towers.initialise(seed=0)
    held_out = glyph_pairs(range(-HELD_OUT, 0), unique=True)
    before, start = retrieval(towers, held_out), time.process_time()
    value = train(towers, kind, given.steps, given.micro_batches)
    seconds, after, chance = time.process_time() - start, retrieval(towers, held_out), 1 / len(held_out[0])
    print(f"{given.steps} steps of {PAIRS} pairs with {kind.name} in {seconds:.0f} s of one core; loss {value:.3f}")
    for what, first, last in zip(("names of pictures", "pictures of names"), before, after, strict=True):
        print(f"{what}: {last:.1%} of {len(held_out[0])} found ({last / chance:.0f} x chance), {first:.1%} before")


if __name__ == "__main__":
    main(sys.argv[1:])
