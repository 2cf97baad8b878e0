"""Write `fixtures.npz`: what transformers' Llama 4 processor makes of the sizes and pictures of `pictures.py`.

Needs transformers 5.23 and torchvision, which nothing else here uses: make a copy of the environment, install there
`pip install --no-deps torchvision==0.28.0` (which fits torch 2.13), and run in the repository's root with its Python
`python -m tests.data.images.make_fixtures`. If torchvision is built for CUDA and torch is not, empty the file
`torchvision/_meta_registrations.py` of that copy: it asks for compiled operators that do not load and are not used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor

from data.images.canvas import TileConfig
from tests.data.images.pictures import PICTURES, picture, sizes

OUT = Path(__file__).with_name("fixtures.npz")
SPELLED = {
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,
    "<|patch|>": 200092,
}


class Recorder(Llama4ImageProcessor):
    """The processor without pixels: it notes the first size that it resizes each picture to, and normalises nothing."""

    def resize(self, image: Any, size: Any, **settings: Any) -> Any:
        self.asked.append((size.height, size.width))
        return torch.zeros(1, dtype=torch.uint8).expand(*image.shape[:-2], size.height, size.width)

    def rescale_and_normalize(self, images: Any, *settings: Any) -> Any:
        return images


def processor(kind: type[Any], config: TileConfig) -> Any:
    side = {"height": config.tile_size, "width": config.tile_size}
    return kind(size=side, max_patches=config.max_tiles, resize_to_max_canvas=config.resize_to_max_canvas)


def spelled(rows: int, columns: int, tokens_per_tile: int) -> Any:
    """Return the ids of the string that transformers puts in the place of a picture."""
    text = Llama4Processor._prompt_split_image(SimpleNamespace(), (rows, columns), tokens_per_tile)
    words = text.replace("><", "> <").split(" ")
    return np.array([SPELLED[word] for word in words], np.int64)


def layouts() -> dict[str, Any]:
    """Return canvases [5000, 2], sizes on the canvas [5000, 2], lengths [5000] and a hash of all token ids in order."""
    canvases, scaled, lengths, digest = [], [], [], hashlib.sha256()
    for height, width, config in sizes():
        one = processor(Recorder, config)
        one.asked = []
        blank = torch.zeros(1, dtype=torch.uint8).expand(3, height, width)
        found = one(images=[blank], return_tensors="pt", input_data_format="channels_first", do_convert_rgb=False)
        rows, columns = found["aspect_ratios"][0].tolist()
        ids = spelled(rows, columns, config.tokens_per_tile)
        canvases.append((rows, columns))
        scaled.append(one.asked[0])
        lengths.append(len(ids))
        digest.update(ids.tobytes())
    return {
        "canvases": np.array(canvases, np.uint8),
        "scaled": np.array(scaled, np.uint16),
        "lengths": np.array(lengths, np.int32),
        "ids_sha256": np.array(digest.hexdigest()),
    }


def main() -> None:
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    one = Llama4ImageProcessor()
    table = one.rescale_and_normalize(greys, True, one.rescale_factor, True, one.image_mean, one.image_std)
    table = table[0, 0].flatten()
    assert table.dtype == torch.bfloat16 and len(table.unique()) == 256
    kept = layouts() | {"table": table.float().numpy()}
    for number, (_, _, config) in enumerate(PICTURES):
        one = processor(Llama4ImageProcessor, config)
        pixels = one(images=[Image.fromarray(picture(number))], return_tensors="pt")["pixel_values"]
        found = torch.searchsorted(table.float(), pixels.float()).to(torch.uint8)
        assert torch.equal(table[found.long()], pixels)
        kept[f"picture{number}"] = found.numpy()
    np.savez_compressed(OUT, **kept)
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
