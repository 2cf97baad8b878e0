"""Divide an input into shards of records, spread over the ranks.

A file that can be read from several places is hashed and counted in ranges of bytes, so that each rank knows where its
shards begin, and then read by all ranks. Any other part of the input is read by one rank. The shards depend on neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import numpy as np

from core.errors import ConfigError, DataError, counted
from core.files import remove_tree
from data.filter.input.readers import InputPart, MalformedRecord, Piece, RecordPart, json_keys
from data.filter.input.records import BAD_LABEL, LABEL, Record
from data.filter.runs import SORTED, DiskArrays, Entries
from data.filter.store import StageStore, Workers, barrier, local_items
from data.filter.tables import OF_PICTURES, PICTURES, THUMBNAILS, make_table
from data.sampling import key_of

UNREADABLE = "unreadable"
"""Domain of malformed records. A domain of the input may have the same name."""


@dataclass(frozen=True)
class ScannedPart:
    """A part of the input with the fingerprint of its content. `pieces`: where reading can begin, if anywhere."""

    part: InputPart
    fingerprint: str
    pieces: Sequence[Piece]


def scan(parts: Sequence[InputPart], workers: Workers) -> list[ScannedPart]:
    """Hash the parts and count their records, each range of bytes on one rank."""
    tasks = [_scans(part) for part in parts]
    results = np.zeros((sum(map(len, tasks)), 6), np.int64)  # a digest, line ends and records
    with barrier(workers):
        for place, task in local_items(list(enumerate(chain(*tasks))), workers):
            digest, *counts = task()
            results[place] = *np.frombuffer(bytes.fromhex(digest), np.int64), *counts
    left, scanned = iter(workers.sum(results)), []
    for part, mine in zip(parts, tasks, strict=True):
        found = [(row[:4].tobytes().hex(), *row[4:].tolist()) for row in islice(left, len(mine))]
        if isinstance(part, RecordPart) and part.path is not None:
            scanned.append(ScannedPart(part, part.fingerprint_of(found), part.pieces(found)))
        else:
            scanned.append(ScannedPart(part, found[0][0], ()))
    return scanned


def _scans(part: InputPart) -> list[Callable[[], tuple[str, int, int]]]:
    if isinstance(part, RecordPart) and part.path is not None:
        return [partial(part.scan, *one) for one in part.byte_ranges]
    return [lambda: (part.fingerprint, 0, 0)]


class Ingest:
    """Makes the shards of the stage `records`. `size`: records per shard. `fail`: raise on a malformed record."""

    def __init__(
        self, stage: StageStore, parts: Sequence[ScannedPart], workers: Workers, size: int, fail: bool
    ) -> None:
        self.stage, self.parts, self.workers, self.size, self.fail = stage, parts, workers, size, fail

    def run(self, report: Callable[[str], None]) -> None:
        """Make the missing shards. On a `ConfigError` the stage is removed: else a rerun with a corrected key would be
        rejected as a changed input.
        """
        stage = self.stage
        stage.open(self.workers)
        shards = stage.shards if stage.is_complete else {}
        try:
            if not shards:
                with barrier(self.workers):
                    for task in local_items(self._tasks(), self.workers):
                        task()
                with barrier(self.workers):
                    shards = self._shards()
                    self._check_readable(shards)
                    self._check_labelled(shards, report)
            disk = DiskArrays(stage.directory / SORTED, shards, self.workers)
            if not stage.is_complete:
                self._check_unique_ids(disk)
        except ConfigError:
            if self.workers.rank == 0:
                remove_tree(stage.directory)
            raise
        if not stage.is_complete:
            stage.close(shards, self.workers)
            files = "1 part" if len(self.parts) == 1 else f"{len(self.parts)} parts"
            report(f"read {sum(shards.values()):,} records of {files}")
        disk.remove()

    def _tasks(self) -> list[Callable[[], None]]:
        """Return what can be done in any order: each piece with the shards that begin in it, and each whole part."""
        tasks: list[Callable[[], None]] = []
        for number, scanned in enumerate(self.parts):
            if not scanned.pieces:
                tasks.append(partial(self._read_part, number))
            ends = accumulate((piece.records for piece in scanned.pieces), initial=0)
            for piece, (begin, end) in zip(scanned.pieces, pairwise(ends), strict=True):
                shards = range(-(-begin // self.size), -(-end // self.size))
                if shards:
                    tasks.append(partial(self._read_shards, number, piece, begin, shards))
        return tasks

    def _read_shards(self, number: int, piece: Piece, begin: int, shards: range) -> None:
        """Read the shards that begin in a piece, whose first record is record `begin` of the part."""
        part = self.parts[number].part
        missing = [shard for shard in shards if not self.stage.has(_shard_name(number, shard))]
        if not missing or not isinstance(part, RecordPart):
            return
        sizes = self._sizes(number)
        records = part.records(piece, skip=missing[0] * self.size - begin)
        for shard in range(missing[0], missing[-1] + 1):
            name = _shard_name(number, shard)
            batch = list(islice(records, sizes[name]))
            if len(batch) < sizes[name]:
                raise DataError(f"{part.name} changed while it was read: run again")
            self._write(name, batch)

    def _sizes(self, number: int) -> dict[str, int]:
        """Return the number of records of each shard of a part with pieces."""
        total = sum(piece.records for piece in self.parts[number].pieces)
        starts = range(0, total, self.size)
        return {_shard_name(number, place): min(self.size, total - start) for place, start in enumerate(starts)}

    def _read_part(self, number: int) -> None:
        stage, name = self.stage, _part_name(number)
        if (stage.directory / name).exists() and all(map(stage.has, stage.read_json(name, {str: int}))):
            return
        shards: dict[str, int] = {}
        records = self.parts[number].part.records()
        while batch := list(islice(records, self.size)):
            shard = _shard_name(number, len(shards))
            self._write(shard, batch)
            shards[shard] = len(batch)
        stage.write_json(name, shards)

    def _write(self, shard: str, batch: Sequence[Record | MalformedRecord]) -> None:
        if self.stage.has(shard):
            return
        for record in batch if self.fail else ():
            if isinstance(record, MalformedRecord):
                raise record.error
        self.stage.write(shard, _records_table(batch))

    def _shards(self) -> dict[str, int]:
        shards: dict[str, int] = {}
        for number, scanned in enumerate(self.parts):
            shards |= self._sizes(number) if scanned.pieces else self.stage.read_json(_part_name(number), {str: int})
        return shards

    def _check_readable(self, shards: dict[str, int]) -> None:
        """Raise `ConfigError` if every record is malformed, because the keys or the input must then be wrong."""
        if not shards:
            raise ConfigError("input", None, f"{', '.join(one.part.name for one in self.parts)} holds no record")
        if any(self.stage.read(shard, ["problem"])["problem"].null_count for shard in shards):
            return
        first = self.stage.read(next(iter(shards)), ["source", "problem", "raw"])
        source, problem, raw = (first[name][0].as_py() for name in ("source", "problem", "raw"))
        keys = ", ".join(map(repr, json_keys(raw)))
        has = "" if problem.endswith(keys) else f"; its keys are {keys}"
        reason = f"none of {sum(shards.values()):,} records can be read; {source}: {problem}{has}"
        settings = self.parts[0].part.keys
        advice = ["text_key=", "prompt_key= with response_key=", "messages_key="] if "text_key" in settings else []
        for key in ("id_key", "domain_key"):
            value = settings.get(key)
            if value is not None and problem.startswith((f"no {value!r};", f"{value!r} is ")):
                advice = [f"{key}="]
        raise ConfigError("input", None, reason, advice)

    def _check_labelled(self, shards: dict[str, int], report: Callable[[str], None]) -> None:
        """Warn of labels that are not numbers. Raise `ConfigError` if a column of labels is named, but none is one."""
        key = self.parts[0].part.keys.get("label_key")
        if key is None:
            return
        bad, first = 0, ""
        for shard in shards:
            if self.stage.has_column(shard, BAD_LABEL):
                table = self.stage.read(shard, ["source", BAD_LABEL])
                table = table.filter(table[BAD_LABEL].is_valid())
                bad += len(table)
                source, value = (table[name][0].as_py() for name in ("source", BAD_LABEL))
                first = first or f"{value} in {source}; {_instead_of(value)}"
        if any(self.stage.has_column(shard, LABEL) for shard in shards):
            if bad:
                report(
                    f"warning: label_key={key}: {counted(bad, 'value')} ignored, since not a number, such as {first}"
                )
            return
        keys = ", ".join(map(repr, json_keys(self.stage.read(next(iter(shards)), ["raw"])["raw"][0].as_py())))
        reason = f"such as {first}" if bad else f"the keys of the first record are {keys}"
        raise ConfigError("label_key", key, f"no record has a number under it; {reason}", () if bad else ["null"])

    def _check_unique_ids(self, disk: DiskArrays) -> None:
        """Raise `ConfigError` if two records have the same id: `explain` needs unique ids. Compares 64-bit hashes."""

        def entries(shard: str) -> Entries:
            keys = [key_of(name) for name in self.stage.read(shard, ["id"])["id"].to_pylist()]
            return np.stack([np.array(keys, np.uint64), np.arange(len(keys), dtype=np.uint64) + disk.first[shard]])

        disk.find_repeats("ids", entries)
        pairs = [tuple(pair) for found in disk.load_all("ids_repeats") for pair in found[:, :1].T.tolist()]
        with barrier(self.workers):
            if pairs:
                (name, source), (_, first) = map(partial(self._id_and_source, disk), min(pairs))
                reason = f"two records are called {name!r}: {first} and {source}"
                advice = "make the ids unique, or omit id_key: then the id is file and line"
                raise ConfigError("id_key", None, f"{reason}; {advice}")

    def _id_and_source(self, disk: DiskArrays, record: int) -> tuple[str, str]:
        shard = max((one for one in disk.first if disk.first[one] <= record), key=disk.first.__getitem__)
        row = self.stage.read(shard, ["id", "source"]).slice(record - disk.first[shard], 1).to_pylist()[0]
        return row["id"], row["source"]


def _instead_of(value: str) -> str:
    """Return what to write instead of a label that is not a number."""
    if value in ("True", "False"):
        return "write 0 and 1"
    numbers = re.findall(r"-?\d+(?:\.\d+)?", value) if value.startswith(("'", '"')) else []
    return f"write {numbers[0]} instead of {value}" if len(numbers) == 1 else "write finite numbers"


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"


def shard_prefix(number: int) -> str:
    """Return how the names of the shards of a part begin."""
    return f"{number:05d}-"


def _shard_name(number: int, shard: int) -> str:
    return f"{shard_prefix(number)}{shard:06d}"


def _records_table(rows: Sequence[Record | MalformedRecord]) -> Any:
    whole = [Record(r.id, UNREADABLE, r.source, "") if isinstance(r, MalformedRecord) else r for r in rows]
    names = ("id", "domain", "source", "text", "answer_start")
    columns: dict[str, Any] = {}
    if any(record.pictures for record in whole):
        columns[PICTURES] = [
            [{name: getattr(picture, name) for name in OF_PICTURES} for picture in record.pictures] for record in whole
        ]
        columns[THUMBNAILS] = [[p.thumbnail for p in record.pictures if p.thumbnail is not None] for record in whole]
    for name in (LABEL, BAD_LABEL):
        if any(getattr(record, name) is not None for record in whole):
            columns[name] = [getattr(record, name) for record in whole]
    return make_table(
        **{name: [getattr(record, name) for record in whole] for name in names},
        raw=[row.raw.encode() if isinstance(row.raw, str) else row.raw for row in rows],
        problem=[row.reason if isinstance(row, MalformedRecord) else None for row in rows],
        **columns,
    )
