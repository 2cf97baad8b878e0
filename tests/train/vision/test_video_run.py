"""A run on clips of a bouncing ball, from ffv1 files to its loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from data.corpus import TRAIN
from data.images.generated.clips import Clip, ClipConfig, clip
from data.images.generated.scenes import COLOURS
from data.images.video import time_text
from tests.support.tiny import trainer
from train.eval.held_out import batch_losses

CLIPS, FRAMES, SIZE = 12, 16, 32
CONFIG = ClipConfig(size=SIZE, frames=FRAMES)
SIZES = f"tile_size: {SIZE}, patch_size: 8"
OVERRIDES = [
    *("model.attention_chunk_size=272", "model.moe_every=0", "optimizer.lr=3e-3"),  # the question sees all frames
    *(f"training.global_batch_size={CLIPS}", f"training.micro_batch_size={CLIPS}", "training.steps=40"),
    "+model.vision={hidden_size: 32, num_layers: 2, num_heads: 2, mlp_hidden_size: 128, adapter_hidden_size: 32, "
    f"image_token_id: 5, {SIZES}}}",
    f"+data.images={{tiles: {{{SIZES}, max_tiles: 1}}}}",
    *("training.seq_len=272", "data.packing=best_fit", "data.pack_seq_len=272"),
    *("data=files", "~data.sources.text", "data.tokenizer.vocab_size=300", "data.held_out=0"),
]


def write_clips(folder: Path) -> list[Clip]:
    """Write clips as Matroska files, and a jsonl file that asks how often the ball bounces."""
    folder.mkdir()
    clips = [clip(number, CONFIG) for number in range(CLIPS)]
    lines = []
    for number, one in enumerate(clips):
        (folder / f"{number}.mkv").write_bytes(one.data)
        parts = [{"video": f"{number}.mkv"}, {"text": f"{one.question} {one.answer}"}]
        lines.append(json.dumps({"parts": parts}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return clips


@pytest.mark.slow
def test_clips_are_trained_on(tmp_path):
    """The pixels of a batch are those of the files, the loss falls, and it depends on the frames."""
    clips = write_clips(tmp_path / "in")
    source = f"+data.sources.clips={{kind: documents, path: {tmp_path / 'in'}}}"
    run = trainer(tmp_path, "run", [*OVERRIDES, source, f"data.cache={tmp_path / 'cache'}"])
    placed, loader, pictures = run.engine.placed, run.loaders["main"], run.corpus.pictures("clips", TRAIN)
    assert pictures is not None
    names = pyarrow.parquet.read_table(run.corpus.directory / pictures.entry["index"])["name"].to_pylist()

    read = run.batches.get(0).images
    assert read is not None and [len(tiles) for tiles in read.tiles] == [FRAMES] * CLIPS
    shown = iter(read.pixels[0])
    for tiles in read.tiles:
        for frame, (tile, pixels) in enumerate(zip(tiles, shown, strict=False)):
            one = clips[int(names[tile.image].partition(".")[0])]
            assert f"at {time_text(frame / CONFIG.fps)}".strip() in names[tile.image]
            x, y = one.path[frame]
            assert tuple(pixels[:, y, x].tolist()) == COLOURS[one.colour]
            assert tuple(pixels[:, 0, 0].tolist()) == one.background
    assert next(shown, None) is None

    losses = [run.train_step(step).loss.item() for step in range(run.steps)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] / 2, losses

    @torch.no_grad()
    def loss(of_other_clips: bool) -> float:
        batch = loader.batch(0)
        assert batch.images is not None
        if of_other_clips:
            batch.images.tiles = [[pictures.distant(tile) for tile in tiles] for tiles in batch.images.tiles]
        found = batch_losses(placed, batch)
        assert found is not None
        return float(found[0].sum(dtype=torch.float64))

    assert loss(False) == loss(False) != loss(True)
    run.batches.close()
