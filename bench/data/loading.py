"""Compare our loader with Hugging Face `datasets` and `grain`: tokens per second of the same packed sequences.

All loaders return int64 tensors [16, 1024] of tokens. Ours also returns positions, and labels that are masked at the
ends of documents. Our loader and grain shuffle globally and resume exactly. `datasets` streams the sequences from Arrow
batches, which is its fastest way: in file order, or through its shuffle buffer, which loses samples when a run resumes.
grain is measured if it is installed. Nothing else runs at the same time, so prefetching hides no time.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.measure import Result, interleaved, median_ratio
from core.config import load
from data.corpus import TRAIN, prepare
from data.loader import Loader
from data.prefetch import Prefetcher
from train.config import TrainConfig

CONTEXT, BATCH, ROUNDS = 1024, 16, 7
OURS = {"ours": 0, "ours with two batches made ahead": 2}
GRAIN, INSTALL = "grain, shuffled over the memory map", "pip install grain==0.2.18"


def hugging_face(path: Path, buffer: int = 0) -> Iterator[torch.Tensor]:
    """Stream batches from a parquet file, in file order or through a shuffle buffer of `buffer` sequences. Each Arrow
    batch is converted as a whole.
    """
    import datasets

    stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True).with_format("arrow")
    if buffer:
        stream = stream.shuffle(seed=0, buffer_size=buffer)
    for table in stream.iter(batch_size=BATCH, drop_last_batch=True):
        flat = table["tokens"].combine_chunks().flatten().to_numpy()
        yield torch.from_numpy(flat.astype(np.int64).reshape(BATCH, CONTEXT))


def grain_rows(rows: NDArray[Any]) -> Iterator[torch.Tensor]:
    """Read batches of sequences from a memory map on two threads, shuffled globally by `MapDataset.shuffle`."""
    import grain

    class Rows:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> NDArray[np.int64]:
            return rows[index].astype(np.int64)

    shuffled = grain.MapDataset.source(Rows()).shuffle(seed=0).batch(BATCH, drop_remainder=True)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in shuffled.to_iter_dataset(options):
        yield torch.from_numpy(batch)


def ours(loader: Loader, batches: int, prefetch: int) -> Iterator[torch.Tensor]:
    ahead = Prefetcher(loader.batch, prefetch)
    for step in range(batches):
        yield ahead.get(step, batches).tokens_BT
    ahead.close()


def consume(batches: Iterator[torch.Tensor]) -> int:
    """Return the number of tokens read. A value of each batch is read, since a training step reads the batch too."""
    return sum(batch.numel() for batch in batches if int(batch[-1, -1]) >= 0)


def _consume_ours(loader: Loader, batches: int, prefetch: int) -> int:
    return consume(ours(loader, batches, prefetch))


def run() -> list[Result]:
    import pyarrow
    import pyarrow.parquet

    corpus = prepare(load("train", TrainConfig, []).data, lambda line: None)
    loader = Loader(corpus, CONTEXT, BATCH, seed=0)
    streams = [corpus.stream(name, TRAIN) for name in corpus.sources]
    tokens = np.concatenate([s.window(r * CONTEXT, CONTEXT) for s in streams for r in range(s.num_sequences(CONTEXT))])
    batches = len(tokens) // CONTEXT // BATCH
    found: list[Result] = []
    with tempfile.TemporaryDirectory() as root:
        table, flat = Path(root) / "rows.parquet", Path(root) / "rows.bin"
        rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens.astype(np.uint16)), CONTEXT)
        pyarrow.parquet.write_table(pyarrow.table({"tokens": rows}), table)
        tokens.astype(np.uint16).tofile(flat)
        mapped = np.memmap(flat, np.uint16, mode="r").view(np.ndarray).reshape(-1, CONTEXT)
        sides: dict[str, Callable[[], int]] = {
            **{name: partial(_consume_ours, loader, batches, depth) for name, depth in OURS.items()},
            "datasets, Arrow batches in file order": lambda: consume(hugging_face(table)),
            "datasets, shuffled through a buffer of 256": lambda: consume(hugging_face(table, 256)),
        }
        if importlib.util.find_spec("grain") is not None:
            sides[GRAIN] = lambda: consume(grain_rows(mapped))
        counts = {name: side() for name, side in sides.items()}
        times = dict(zip(sides, interleaved(list(sides.values()), ROUNDS), strict=True))
    assert len(set(counts.values())) == 1, counts
    rates = {name: [counts[name] / seconds for seconds in found_s] for name, found_s in times.items()}
    note = f"{batches} batches of {BATCH} rows of {CONTEXT}, {ROUNDS} rounds"
    for name in OURS:
        for other in (name for name in sides if name not in OURS):
            ratio = median_ratio(rates[name], rates[other])
            medians = float(np.median(rates[name])), float(np.median(rates[other]))
            what = f"loading: {name} vs {other} (tokens/s)"
            found.append(Result(what, *medians, ratio, "> 1", ratio > 1, note))
    if GRAIN not in sides:
        found.append(Result(f"loading: ours vs {GRAIN}", 0.0, 0.0, 0.0, "> 1", True, f"not measured: {INSTALL}"))
    return found
