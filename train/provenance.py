"""Find the steps of a run that trained on a document, from the document's position in its source's token stream.

This needs no log of samples, because their order is a pure function of the configuration and the corpus. With online
filtering, `online.jsonl` lists the samples that were taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ConfigError
from data.corpus import DOCUMENTS, Corpus
from data.filter.audit.outputs import SCORES
from data.filter.explain import explain, find
from parallel.comm.world import World
from train.config import Phase, TrainConfig, phases
from train.corpus import run_loaders, stored_corpus
from train.eval.contamination import MODELS
from train.run_directory import RunDirectory, load_config, read_lines

_ORDINALS_AT_ONCE = 1 << 20
_SHOWN = 20


@dataclass(frozen=True)
class TrainedSequence:
    """Sequence number `index` of the global batch of `step`, counted from the start of the run."""

    phase: str
    step: int
    index: int


@dataclass(frozen=True)
class DocumentSpan:
    """The position of a document, from BOS to EOS, in the training stream of its source."""

    source: str
    start: int
    tokens: int

    def sequences(self, seq_len: int) -> tuple[int, int]:
        """Return the first and the last sequence of the stream in which a token of the document is a label. All tokens
        but BOS are labels, each in the sequence that contains the token before it.
        """
        return self.start // seq_len, (self.start + self.tokens - 2) // seq_len


def explain_run(directory: Path, name: str) -> str:
    """Explain what the filter of a run's data did with the record `name`, and which steps trained on it."""
    config = load_config(directory)
    corpus = stored_corpus(directory, config, World(0, 1, torch.device("cpu")), lambda line: None, MODELS)
    if not (corpus.directory / SCORES).exists():
        raise ConfigError("run", str(directory), "its data were not filtered: data.filter is null")
    lines = [explain(corpus.directory, name)]
    if not find(corpus.directory, name)["kept"]:
        return lines[0]
    place = find_place(corpus, name)
    if place is None:
        return "\n".join([*lines, "not in the token stream: it is longer than data.limit_tokens"])
    steps = max((line["step"] for line in read_lines(RunDirectory(directory).metrics, {"step": int})), default=0)
    found = visits(directory, config, corpus, place, steps)
    lines.append(f"trained on in {len(found):,} sequences of the {steps:,} logged steps")
    lines += [f"  step {one.step} ({one.phase}), sequence {one.index} of the batch" for one in found[:_SHOWN]]
    lines += [f"  and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else []
    return "\n".join(lines)


def find_place(corpus: Corpus, name: str) -> DocumentSpan | None:
    """Return the span of the training document `name`, or None if it has no tokens."""
    import pyarrow.parquet

    for source in corpus.sources:
        path = corpus.directory / f"{source}{DOCUMENTS}"
        if path.exists():
            found = pyarrow.parquet.read_table(path, filters=[("name", "=", name)]).to_pylist()
            if found:
                return DocumentSpan(source, found[0]["start"], found[0]["tokens"])
    return None


def visits(
    directory: Path, config: TrainConfig, corpus: Corpus, place: DocumentSpan, steps: int
) -> list[TrainedSequence]:
    """Return, in order, the sequences in the first `steps` steps of a run that contain part of the document."""
    found, loaders = [], run_loaders(config, corpus, lambda line: None)
    for phase in phases(config):
        loader = loaders[phase.name]
        if place.source not in loader.blend.names:
            continue
        first, last = place.sequences(phase.seq_len)
        for samples, ordinals in _taken(directory, config, phase, min(steps, phase.stop)):
            sources, sequences = loader.locate(ordinals)
            hits = (sources == loader.blend.names.index(place.source)) & (sequences >= first) & (sequences <= last)
            for sample in samples[hits].tolist():
                step, index = divmod(sample, phase.global_batch_size)
                found.append(TrainedSequence(phase.name, phase.start + step, index))
    return sorted(found, key=lambda one: (one.step, one.index))


def _taken(
    directory: Path, config: TrainConfig, phase: Phase, stop: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for the samples of a phase before step `stop`, positions in training and ordinals in the phase's order."""
    count = max(stop - phase.start, 0) * phase.global_batch_size
    if not config.online.every:
        for begin in range(0, count, _ORDINALS_AT_ONCE):
            samples = np.arange(begin, min(begin + _ORDINALS_AT_ONCE, count))
            yield samples, samples
        return
    for window in read_lines(RunDirectory(directory).online, {"first_step": int, "rows": [int]}):
        begin = (window["first_step"] - phase.start) * phase.global_batch_size
        if phase.start <= window["first_step"] < stop:
            ordinals = np.asarray(window["rows"], np.int64)[: count - begin]
            yield np.arange(begin, begin + len(ordinals)), ordinals
