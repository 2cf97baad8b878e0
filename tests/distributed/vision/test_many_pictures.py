"""Documents with 48 pictures, the most that are allowed, and with one more."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from launch.cli import main
from tests.distributed.vision.test_vision_runs import differences, images_of, train_on_rank
from tests.support.mixed import png
from tests.support.tiny import TINY
from tests.train.vision.test_vision_run import VISION, data_of

MOST = 48
SIZES = [(8, 8), (5, 7), (7, 4)]
"""Pictures of one tile. Each takes 7 tokens: 4 of the encoder, and 3 around them."""


def pictures(number: int, count: int) -> list[bytes]:
    return [png(100 * number + place, *SIZES[place % len(SIZES)]) for place in range(count)]


def write_jsonl(folder: Path, counts: list[int]) -> Path:
    """Write a document of each number of pictures, with a word after each picture."""
    lines = []
    for number, count in enumerate(counts):
        parts: list[dict[str, str]] = [{"text": f"album {number}"}]
        for place, content in enumerate(pictures(number, count)):
            (folder / f"{number}-{place}.png").write_bytes(content)
            parts += [{"image": f"{number}-{place}.png"}, {"text": f" {place % 10}"}]
        lines.append(json.dumps({"parts": parts}))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines))
    return path


def write_parquet(folder: Path, counts: list[int]) -> Path:
    """Write the same as interleaved lists of texts and pictures."""
    rows = []
    for number, count in enumerate(counts):
        texts: list[str | None] = [f"album {number}"]
        images: list[bytes | None] = [None]
        for place, content in enumerate(pictures(number, count)):
            texts += [None, f" {place % 10}"]
            images += [content, None]
        rows.append({"texts": texts, "images": images})
    schema = pyarrow.schema([("texts", pyarrow.list_(pyarrow.string())), ("images", pyarrow.list_(pyarrow.binary()))])
    path = folder / "documents.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


Write = Callable[[Path, list[int]], Path]
PACKED = ["training.seq_len=576", "data.packing=best_fit", "data.pack_seq_len=576", "training.global_batch_size=4"]


def overrides(path: Path, *more: str) -> list[str]:
    source = f"data.sources.mixed.path={path}"
    return [*VISION, *data_of(path.parent), source, *PACKED, *more]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_48_pictures_on_two_ranks(ranks, tmp_path, write: Write):
    """Context parallelism cuts the document between two ranks, each of which encodes half of its tiles."""
    words = overrides(write(tmp_path, [MOST] * 16), "data.held_out=0.5")
    (alone,) = ranks(1, train_on_rank, tmp_path / "one", words)
    assert all(len(tiles) == MOST for batch in alone.batches for tiles in images_of(batch).tiles)
    found = ranks(2, train_on_rank, tmp_path / "two", [*words, "parallel.cp=2"])
    for run in found:
        assert all(len(pixels) == MOST for batch in run.batches for pixels in images_of(batch).pixels)
    assert differences(alone, found) == []
    broken = ranks(2, train_on_rank, tmp_path / "broken", [*words, "parallel.cp=2"], "tiles_in_reverse_order")
    assert any("gradients" in one for one in differences(alone, broken))


@pytest.mark.parametrize("write, record", [(write_jsonl, "documents.jsonl:2"), (write_parquet, "documents.parquet:1")])
def test_49_pictures_are_refused(tmp_path, capsys, write: Write, record):
    words = overrides(write(tmp_path, [3, MOST + 1]), f"run.root={tmp_path}", "run.name=run", "training.steps=1")
    train = partial(main, ["train", *TINY, *words])
    assert train() == 2
    assert f"{record}: has 49 pictures and videos, more than data.images.max_images=48" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("metrics.jsonl"))
