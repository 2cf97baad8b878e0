"""A tiny contrastive run for tests: pictures of characters with their names."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny import TINY

PAIRS = 48
SIZES = [
    "model.vocab_size=264",
    "model.num_layers=2",
    "model.moe_every=0",
    "model.balance.aux=0",
    "model.balance.z=0",
    "+model.vision={hidden_size: 16, num_layers: 1, num_heads: 2, mlp_hidden_size: 32, adapter_hidden_size: 24, "
    "tile_size: 16, patch_size: 4, image_token_id: 5}",
    "training.objective=contrastive",
    "training.contrastive.feature_size=12",
]


def pairs_of(cache: Path, *sources: str) -> list[str]:
    """Return overrides for pairs of these sources, by default characters, in sequences of 48 tokens."""
    glyphs = f"data.sources={{glyphs: {{kind: 'data.images.generated.sources:Glyphs', options: {{number: {PAIRS}, size: 16}}}}}}"
    return [
        "data=files",
        *(sources or ["~data.sources.text", "+" + glyphs]),
        "+data.images={tiles: {tile_size: 16, patch_size: 4, max_tiles: 1}}",
        "data.packing=pairs",
        "data.pack_seq_len=48",
        "data.held_out=0.2",
        "data.tokenizer.vocab_size=264",
        f"data.cache={cache}",
    ]
