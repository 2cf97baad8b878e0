"""Write small documents of text and pictures."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

_SIZES = "tile_size: 8, patch_size: 2"
TINY_PICTURES = [
    "+model.vision={hidden_size: 16, num_layers: 2, num_heads: 2, mlp_hidden_size: 64, adapter_hidden_size: 16, "
    f"image_token_id: 5, {_SIZES}}}",
    f"+data.images={{tiles: {{{_SIZES}, max_tiles: 4}}}}",
    "+data.sources.scenes={kind: 'data.images.generated.sources:Scenes', options: {number: 60}}",
]
"""Overrides that add an encoder and scenes to a tiny run."""


def png(number: int, width: int, height: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def write_documents(folder: Path, count: int = 40, first: list[dict[str, str]] | None = None) -> Path:
    """Write documents of text and 0 to 3 pictures of several shapes, as jsonl beside the pictures."""
    draw, lines = random.Random(1), [json.dumps({"parts": first})] if first else []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        parts: list[dict[str, str]] = [{"text": f"document {number} " + "word " * draw.randrange(9)}]
        for place in range(number % 4):
            name = f"{number}-{place}.png"
            (folder / name).write_bytes(png(10 * number + place, *draw.choice([(8, 8), (5, 7), (16, 8), (20, 20)])))
            parts += [{"image": name}, {"text": "and " * draw.randrange(4)}]
        lines.append(json.dumps({"parts": parts}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder / "documents.jsonl"
