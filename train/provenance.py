"""Find the steps of a run that trained on a document, from the document's position in its source's token stream, and
the pictures of a step.

This needs no log of samples, because their order is a pure function of the configuration and the corpus. With online
filtering, `online.jsonl` lists the samples that were taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ConfigError, printable
from data.corpus import DOCUMENTS, TRAIN, Corpus
from data.filter.audit.outputs import SCORES
from data.filter.explain import explain, find
from data.images.store import PictureStream, StoredPicture
from data.loader import Loader
from parallel.comm.world import World
from train.config import Phase, TrainConfig, phases
from train.corpus import run_loaders, stored_corpus
from train.eval.contamination import MODELS
from train.recovery.amendments import read_amendments
from train.run_directory import RunDirectory, load_config, read_lines

_ORDINALS_AT_ONCE = 1 << 20
_SHOWN = 20


@dataclass(frozen=True)
class TrainedSequence:
    """Sequence number `index` of the global batch of `step`, counted from the start of the run. `start`, `tokens`: its
    place in the stream of its source.
    """

    phase: str
    step: int
    index: int
    start: int = field(default=0, compare=False)
    tokens: int = field(default=0, compare=False)


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
    is_filtered, places = (corpus.directory / SCORES).exists(), find_places(corpus, name)
    if not is_filtered and not places:
        if not any((corpus.directory / f"{source}{DOCUMENTS}").exists() for source in corpus.sources):
            raise ConfigError("run", str(directory), "its data were not filtered: data.filter is null")
        raise ConfigError("explain", name, f"no training document of {directory} has this name")
    if is_filtered and not find(corpus.directory, name)["kept"]:
        return explain(corpus.directory, name)
    lines = [explain(corpus.directory, name, with_pictures=False) if is_filtered else f"{name}: not filtered"]
    if not places:
        limits = {f"data.{key}": getattr(config.data, key) for key in ("limit_tokens", "pack_seq_len")}
        over = " or ".join(f"{key}={limit}" for key, limit in limits.items() if limit is not None)
        return "\n".join([*lines, f"not in the token stream: it or a picture of it is longer than {over}"])
    pictures = [one for place in places for one in _pictures_in(corpus, place)]
    lines += [f"picture {number}: {_described(picture)}" for number, picture in enumerate(pictures)]
    steps = max((line["step"] for line in read_lines(RunDirectory(directory).metrics, {"step": int})), default=0)
    found = {one: None for place in places for one in visits(directory, config, corpus, place, steps)}
    visited = sorted(found, key=lambda one: (one.step, one.index))
    lines.append(f"trained on in {len(visited):,} sequences of the {steps:,} logged steps")
    stream = corpus.pictures(places[0].source, TRAIN)
    lines += [f"  {_visit(one, pictures, stream)}" for one in visited[:_SHOWN]]
    lines += [f"  and {len(visited) - _SHOWN:,} more"] if len(visited) > _SHOWN else []
    return "\n".join(lines)


def explain_step(directory: Path, step: int) -> str:
    """List the pictures in the sequences of a step, counted from 0, with their documents, tiles and tokens.

    A picture at the border of a sequence may show some of its tiles there.
    """
    config = load_config(directory)
    corpus = stored_corpus(directory, config, World(0, 1, torch.device("cpu")), lambda line: None, MODELS)
    phase = next((one for one in phases(config) if one.start <= step < one.stop), None)
    if phase is None:
        raise ConfigError("step", step, f"the run has the steps 0 to {phases(config)[-1].stop - 1}")
    if corpus.images is None:
        raise ConfigError("run", str(directory), "its data have no pictures")
    loader = _loaders(directory, config, corpus)[phase.name]
    ordinals = _ordinals_of(directory, config, phase, step)
    steps = np.full(len(ordinals), step - phase.start)
    lines: list[str] = []
    documents = {source: _Documents(corpus, source) for source in corpus.sources}
    for index, (number, sequence) in enumerate(zip(*loader.locate(ordinals, steps), strict=True)):
        source = loader.blend.names[number]
        if (stream := corpus.pictures(source, TRAIN)) is None:
            continue
        _, refs = stream.rows_of(int(sequence) * phase.seq_len, phase.seq_len)
        for image, tiles in groupby(refs, key=lambda ref: ref.image):
            picture = _picture(stream, source, image)
            shown = [ref.tile for ref in tiles]
            whole = "" if len(shown) == picture.stored.canvas.tiles else f"; tiles {shown[0]} to {shown[-1]} are shown"
            document = printable(documents[source].name(picture.start))
            lines.append(f"  sequence {index}, {document}: {_described(picture)}{whole}")
    return "\n".join([f"step {step} ({phase.name}): {len(lines):,} pictures in {len(ordinals):,} sequences", *lines])


@dataclass(frozen=True)
class _StreamPicture:
    """Picture number `image` of a source's training stream. `start`: its first token."""

    source: str
    image: int
    start: int
    stored: StoredPicture


def _pictures_in(corpus: Corpus, place: DocumentSpan) -> list[_StreamPicture]:
    if (stream := corpus.pictures(place.source, TRAIN)) is None:
        return []
    numbers = stream.inside(place.start, place.start + place.tokens)
    return [_picture(stream, place.source, image) for image in numbers]


def _picture(stream: PictureStream, source: str, image: int) -> _StreamPicture:
    return _StreamPicture(source, image, int(stream.starts[image]), stream.describe(image))


def _described(picture: _StreamPicture) -> str:
    stored, last = picture.stored, picture.start + picture.stored.tokens - 1
    tiles = f"{stored.canvas.tiles} tile{'' if stored.canvas.tiles == 1 else 's'}"
    place = f"tokens {picture.start:,} to {last:,} of {picture.source}"
    return f"{printable(stored.name)}, {stored.bytes:,} bytes, {tiles}, {place}, SHA-256 {stored.sha256}"


def _visit(visit: TrainedSequence, pictures: list[_StreamPicture], stream: PictureStream | None) -> str:
    """Describe a sequence, and of which of the document's pictures it shows a tile."""
    tiles = [] if stream is None else stream.rows_of(visit.start, visit.tokens)[1]
    images = {tile.image for tile in tiles}
    shown = [number for number, picture in enumerate(pictures) if picture.image in images]
    named = f", picture{'' if len(shown) == 1 else 's'} {', '.join(map(str, shown))}" if shown else ""
    return f"step {visit.step} ({visit.phase}), sequence {visit.index} of the batch{named}"


class _Documents:
    """The names of a source's training documents by their place in the stream."""

    def __init__(self, corpus: Corpus, source: str) -> None:
        import pyarrow.parquet

        path = corpus.directory / f"{source}{DOCUMENTS}"
        table = pyarrow.parquet.read_table(path) if path.exists() else None
        self._starts = np.zeros(0, np.int64) if table is None else table["start"].to_numpy()
        self._names = [] if table is None else table["name"].to_pylist()

    def name(self, token: int) -> str:
        place = int(np.searchsorted(self._starts, token, "right")) - 1
        return self._names[place] if place >= 0 else "a document without a name"


def find_places(corpus: Corpus, name: str) -> list[DocumentSpan]:
    """Return the spans of the training document `name`: none if it has no tokens, several if packing has cut it."""
    import pyarrow.parquet

    for source in corpus.sources:
        path = corpus.directory / f"{source}{DOCUMENTS}"
        if path.exists():
            found = pyarrow.parquet.read_table(path, filters=[("name", "=", name)]).to_pylist()
            if found:
                return [DocumentSpan(source, row["start"], row["tokens"]) for row in found]
    return []


def visits(
    directory: Path, config: TrainConfig, corpus: Corpus, place: DocumentSpan, steps: int
) -> list[TrainedSequence]:
    """Return, in order, the sequences in the first `steps` steps of a run that contain part of the document."""
    found, loaders = [], _loaders(directory, config, corpus)
    for phase in phases(config):
        loader = loaders[phase.name]
        if place.source not in loader.blend.names:
            continue
        first, last = place.sequences(phase.seq_len)
        for samples, ordinals in _taken(directory, config, phase, min(steps, phase.stop)):
            sources, sequences = loader.locate(ordinals, samples // phase.global_batch_size)
            hits = (sources == loader.blend.names.index(place.source)) & (sequences >= first) & (sequences <= last)
            for sample, sequence in zip(samples[hits].tolist(), sequences[hits].tolist(), strict=True):
                step, index = divmod(sample, phase.global_batch_size)
                begin = sequence * phase.seq_len
                found.append(TrainedSequence(phase.name, phase.start + step, index, begin, phase.seq_len))
    return sorted(found, key=lambda one: (one.step, one.index))


def _loaders(directory: Path, config: TrainConfig, corpus: Corpus) -> dict[str, Loader]:
    """Make the loaders of a run, without the documents that recovery has excluded."""
    loaders = run_loaders(config, corpus, lambda line: None)
    exclusions = read_amendments(RunDirectory(directory).amendments, corpus.fingerprint).exclusions
    for phase in phases(config):
        loaders[phase.name].exclude(exclusions, phase.start)
    return loaders


def _ordinals_of(directory: Path, config: TrainConfig, phase: Phase, step: int) -> NDArray[np.int64]:
    """Return the ordinals of a step's samples in the phase's order. Raises `ConfigError` if they are not known yet."""
    if not config.online.every:
        first = (step - phase.start) * phase.global_batch_size
        return np.arange(first, first + phase.global_batch_size)
    for samples, ordinals in _taken(directory, config, phase, step + 1):
        mine = samples // phase.global_batch_size == step - phase.start
        if mine.any():
            return ordinals[mine]
    raise ConfigError("step", step, "the run has not come to this step, and online filtering selects its sequences")


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
