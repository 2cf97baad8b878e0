"""A tiny contrastive run for tests: small pictures with captions, among documents that are no pairs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.mixed import png
from tests.support.tiny import TINY

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
NO_PAIRS: dict[str, list[dict[str, str]]] = {
    "without picture": [{"text": "words alone"}],
    "without caption": [{"image": "0.png"}, {"text": " \n\u200b\u00ad\x07\ufeff\u2028"}],
    "with several tiles": [{"image": "0.png"}, {"text": "two of them"}, {"image": "1.png"}],
    "longer than a sequence": [{"image": "0.png"}, {"text": "huge " * 500}],
}
TOWERS = [
    *TINY,
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


def caption(number: int) -> str:
    return f"{WORDS[number % 10]} {WORDS[number // 10]}"


def write_pairs(folder: Path, count: int = 40) -> Path:
    """Write pairs, and one document of each of `NO_PAIRS`, as jsonl beside the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = list(NO_PAIRS.values())
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number, 16, 12))
        parts = [{"image": f"{number}.png"}, {"text": caption(number)}]
        documents.append(parts if number % 3 else parts[::-1])
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"parts": parts}) for parts in documents))
    return folder / "pairs.jsonl"


def overrides(root: Path) -> list[str]:
    """Return the overrides of a run on pairs that are written below `root`."""
    path = root / "pairs" / "pairs.jsonl"
    return [
        *TOWERS,
        "data=files",
        "data.sources.text.kind=documents",
        f"data.sources.text.path={path if path.exists() else write_pairs(root / 'pairs')}",
        "+data.images={tiles: {tile_size: 16, patch_size: 4, max_tiles: 1}}",
        "data.packing=pairs",
        "data.pack_seq_len=48",
        "data.held_out=0.2",
        "data.tokenizer.vocab_size=264",
        f"data.cache={root / 'cache'}",
    ]
