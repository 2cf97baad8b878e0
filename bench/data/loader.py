"""Compare our loader with Hugging Face streaming: tokens per second of the same packed sequences as torch tensors.

The sequences are the training tokens of the built-in corpus, 1,024 each. Hugging Face streams them from a parquet file,
with and without its shuffle buffer. Our loader shuffles globally. It also returns positions, and labels that are masked
at the ends of documents.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.measure import Result
from core.config import load
from data.corpus import TRAIN, prepare
from data.loader import Loader
from train.config import TrainConfig

CONTEXT, BATCH, ROUNDS = 1024, 16, 5


def hugging_face(path: Path, buffer: int) -> Iterator[int]:
    import datasets

    stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True).with_format("numpy")
    if buffer:
        stream = stream.shuffle(seed=0, buffer_size=buffer)
    for batch in stream.iter(batch_size=BATCH, drop_last_batch=True):
        yield torch.from_numpy(np.asarray(batch["tokens"], dtype=np.int64)).numel()


def ours(loader: Loader, batches: int) -> Iterator[int]:
    for step in range(batches):
        yield loader.batch(step).tokens_BT.numel()


def rate(batches: Iterator[int]) -> float:
    begin = time.perf_counter()
    tokens = sum(batches)
    return tokens / (time.perf_counter() - begin)


def run() -> list[Result]:
    import pyarrow
    import pyarrow.parquet

    corpus = prepare(load("train", TrainConfig, []).data, lambda line: None)
    loader = Loader(corpus, CONTEXT, BATCH, seed=0)
    streams = [corpus.stream(name, TRAIN) for name in corpus.sources]
    rows = [s.window(r * CONTEXT, CONTEXT) for s in streams for r in range(s.num_sequences(CONTEXT))]
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "rows.parquet"
        fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.concatenate(rows).astype(np.uint16)), CONTEXT)
        pyarrow.parquet.write_table(pyarrow.table({"tokens": fixed}), path)
        sides = {
            "ours": lambda: ours(loader, len(rows) // BATCH),
            "in file order": lambda: hugging_face(path, 0),
            "shuffled through a buffer of 256": lambda: hugging_face(path, 256),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(ROUNDS + 1):
            for name, side in sides.items():
                seen = rate(side())
                if round_:
                    rates[name].append(seen)
    found = []
    for name in list(sides)[1:]:
        pairs = zip(rates["ours"], rates[name], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        medians = statistics.median(rates["ours"]), statistics.median(rates[name])
        note = f"{len(rows):,} rows of {CONTEXT}, batches of {BATCH}; ours is shuffled in both rows"
        found.append(
            Result(f"loader vs Hugging Face streaming, {name} (tokens/s)", *medians, ratio, "> 1", ratio > 1, note)
        )
    return found
