"""Keep some held-out documents with pictures in the run's directory, with what the model answers, for the report.

The last token of a document is its answer, as in `train.eval.answers`.

Shapes: N sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.files import write_bytes, write_json
from data.corpus import HELD_OUT, Corpus
from data.images.decode import decode
from data.images.store import PictureStream
from data.loader import Batch
from parallel.fsdp import release
from parallel.parallelize import ParallelModel
from train.eval.answers import last_tokens
from train.eval.held_out import HeldOutLoader, local_batches, predictions
from train.run_directory import EXAMPLES

MOST, MOST_PICTURES = 12, 4
"""Documents of a source, and pictures of a document."""
LONGEST_SIDE, LONGEST_QUESTION = 160, 300
"""Pixels of a kept picture, and characters of a question."""


@dataclass(frozen=True)
class Example:
    """`pictures`: the numbers of the document's pictures in the source's held-out stream. `question`: its text before
    the last token; `answer` and `predicted`: that token and what the model predicts.
    """

    source: str
    pictures: list[int]
    question: str
    answer: str
    predicted: str
    is_right: bool


@torch.no_grad()
def examples(
    placed: ParallelModel, loader: HeldOutLoader, source: str, micro_batch_size: int, corpus: Corpus
) -> list[Example]:
    """Return what the model predicts for the first documents with pictures of a source's held-out split, the same on
    every rank. Empty for a source without pictures.
    """
    if corpus.pictures(source, HELD_OUT) is None:
        return []
    count = min(MOST, loader.num_held_out(source))
    take = partial(loader.held_out, source)
    predicted_NT = torch.zeros(count, loader.seq_len, dtype=torch.int64, device=placed.device)
    columns = placed.context_shard(loader.seq_len).columns.to(placed.device)
    placed.model.eval()
    for start, batch in local_batches(take, count, micro_batch_size, placed.meshes.dp):
        if (found := predictions(placed, batch)) is not None:
            stop = min(start + micro_batch_size, count)
            predicted_NT[start:stop].index_copy_(1, columns, found[0][: stop - start])
    placed.meshes.world.sum(predicted_NT, "evaluation")
    placed.model.train()
    release(placed.stacks)
    return _described(source, take(0, count), predicted_NT.cpu(), corpus) if count else []


def _described(source: str, batch: Batch, predicted_NT: Tensor, corpus: Corpus) -> list[Example]:
    assert corpus.images is not None and batch.images is not None
    decoded, per_tile = corpus.tokenizer.decode, batch.images.tokens_per_tile
    hidden = torch.tensor([corpus.tokenizer.bos_id, *vars(corpus.images.ids).values()])
    found = []
    for row, place in last_tokens(batch, corpus).nonzero()[:MOST].tolist():
        begin = place - int(batch.positions_BT[row, place])
        tokens_T, rows_T = batch.tokens_BT[row, begin : place + 1], batch.images.rows_BT[row, begin : place + 1]
        tiles = (rows_T[rows_T >= 0] // per_tile).unique().tolist()
        pictures = list(dict.fromkeys(batch.images.tiles[row][tile].image for tile in tiles))
        question = decoded(tokens_T[~torch.isin(tokens_T, hidden)].tolist())
        label, predicted = int(batch.labels_BT[row, place]), int(predicted_NT[row, place])
        found.append(Example(source, pictures, question, decoded([label]), decoded([predicted]), label == predicted))
    return found


def write_examples(directory: Path, step: int, found: list[Example], corpus: Corpus) -> None:
    """Write the examples after `step` steps to a directory, with small copies of their pictures. Raises `OSError`."""
    directory.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for one in found:
        pictures = corpus.pictures(one.source, HELD_OUT)
        assert pictures is not None
        line: dict[str, Any] = {**vars(one), "question": one.question.strip()}
        if len(line["question"]) > LONGEST_QUESTION:
            line["question"] = f"… {line['question'][-LONGEST_QUESTION:]}"
        shown = one.pictures[:MOST_PICTURES]
        names = [_keep(directory, pictures, number) for number in shown]
        lines.append({**line, "pictures": names, "more": len(one.pictures) - len(shown)})
    write_json(directory / EXAMPLES, {"step": step, "examples": lines})


def _keep(directory: Path, pictures: PictureStream, number: int) -> str:
    """Write a small copy of a picture, unless it is there. Return the file's name."""
    content = pictures.content(number)
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    if not (directory / name).exists():
        picture = decode(content, f"picture {number} of {pictures.path}", pictures.images.largest_pixels)
        file = io.BytesIO()
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        picture.save(file, "PNG")
        write_bytes(directory / name, file.getvalue())
    return name
