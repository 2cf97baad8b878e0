"""Write, validate and read a checkpoint's index, which says which bytes of which file hold each block of each tensor.

A checkpoint is a directory `step-00000100` with a file of shards per rank (`rank_0.bin`), an index, `progress.json`
(the trainer's state) and, written last, the marker `COMMITTED` with the size of every other file and the digests of the
JSON files. A directory without the marker is a partly written checkpoint and is never read. A single rank writes the
index as `index.json` (format 2). Several ranks each write the part that describes their own shards, `rank_0.json` etc.
(format 3), so that no rank handles the whole index. Older versions wrote format 2 for any number of ranks.

    {"tensors": {"model.head.weight": {"dtype": "float32", "shape": [320, 32], "shards": [
        {"offset": [0, 0], "shape": [160, 32], "file": "rank_0.bin", "start": 0, "bytes": 20480, "digest": "..."},
        ...]}}}

A checkpoint is untrusted input. All of it is JSON and raw bytes, and every field is validated before it is used: file
names cannot leave the directory, and shards cover each tensor and each file exactly once.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash
from torch import Tensor

from core.errors import CheckpointError, OneLineError, UnreadableFileError, one_line
from core.files import read_json, write_bytes, write_json
from train.config import TrainConfig
from train.run_directory import MARKER, check_settings, committed

FORMATS = (2, 3)
"""Format 2 has one index, and format 3 a part of it for each rank."""
INDEX = "index.json"
PROGRESS = "progress.json"
_PROGRESS_SHAPE: dict[str, Any] = {
    **{"step": int, "tokens?": int, "corpus?": str, "vocabulary?": str},
    **{"settings?": {}, "layout?": {}, "callbacks?": {}},
}
_OLD_FORMAT = (
    "was written by an older version of Leviathan, whose checkpoints could run code: "
    "train again, or export the model with that version"
)
UNREADABLE = "cannot be read"
"""How a problem begins that may lie with permissions or the disk rather than with the files."""
_MAX_DIMS = 8
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
T = TypeVar("T")


class Damaged(OneLineError):
    """The files of a checkpoint differ from what was written. The message is one line."""


class IndexedShard(NamedTuple):
    """A block of a tensor, and the position of its bytes in a file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class IndexedTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: list[IndexedShard]

    def overlapping(
        self, offset: Sequence[int], shape: Sequence[int]
    ) -> Iterator[tuple[IndexedShard, list[int], list[int]]]:
        """Yield each shard that overlaps the given block, with the overlap's offset in the tensor and its shape."""
        for shard in self.shards:
            low = [max(pair) for pair in zip(offset, shard.offset, strict=True)]
            ends = zip(offset, shape, shard.offset, shard.shape, strict=True)
            size = [min(a + b, c + d) - start for start, (a, b, c, d) in zip(low, ends, strict=True)]
            if all(length > 0 for length in size):
                yield shard, low, size

    def covers(self, offset: Sequence[int], shape: Sequence[int]) -> bool:
        """Return whether the shards cover the given block exactly once."""
        inside = [
            shard._replace(offset=tuple(a - b for a, b in zip(low, offset, strict=True)), shape=tuple(size))
            for shard, low, size in self.overlapping(offset, shape)
        ]
        return _tile(tuple(shape), inside)


def block(tensor: Tensor, origin: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return a view of the block at `offset` of a whole tensor, in which `tensor` is a part that begins at `origin`."""
    for dimension, (first, start, length) in enumerate(zip(origin, offset, shape, strict=True)):
        tensor = tensor.narrow(dimension, start - first, length)
    return tensor


def commit(checkpoint: Path, parts: Iterable[Mapping[str, IndexedTensor]], progress: Mapping[str, Any]) -> None:
    """Write the index, the trainer's state and, last, the marker. The shards must already be on disk.

    `parts`: the index entries of each rank. Raises `CheckpointError` unless the shards make up every tensor.
    """
    index = join_parts(parts)
    for name, tensor in index.items():
        if not _tile(tensor.shape, tensor.shards):
            raise CheckpointError(f"the shards of {name} do not make up its shape {list(tensor.shape)}")
    _mark(checkpoint, 2, _write_index(checkpoint / INDEX, index), progress)


def write_part(checkpoint: Path, rank: int, index: Mapping[str, IndexedTensor]) -> dict[str, Any]:
    """Write the part of the index that describes a rank's shards. Returns its entries and those of the files of shards
    for the marker.
    """
    return _write_index(checkpoint / f"rank_{rank}.json", index)


def commit_parts(checkpoint: Path, parts: Iterable[Mapping[str, Any]], progress: Mapping[str, Any]) -> None:
    """Write the trainer's state and, last, the marker. `parts`: what `write_part` returned on each rank. The caller has
    verified that the shards make up every tensor.
    """
    _mark(checkpoint, 3, {name: entry for part in parts for name, entry in part.items()}, progress)


def join_parts(parts: Iterable[Mapping[str, IndexedTensor]]) -> dict[str, IndexedTensor]:
    """Return the shards of all parts by tensor. Raises `Damaged` if two parts describe a tensor differently."""
    index: dict[str, IndexedTensor] = {}
    for name, tensor in (item for part in parts for item in part.items()):
        if (known := index.setdefault(name, replace(tensor, shards=[]))).shape != tensor.shape:
            raise Damaged(f"two ranks describe {name} with different shapes")
        known.shards.extend(tensor.shards)
    return index


def _write_index(path: Path, index: Mapping[str, IndexedTensor]) -> dict[str, Any]:
    """Write an index. Returns the marker's entries of it and of the files that it describes."""
    tensors = {
        name: {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "shards": [shard._asdict() for shard in tensor.shards],
        }
        for name, tensor in index.items()
    }
    content = json.dumps({"tensors": tensors}, separators=(",", ":")).encode()
    write_bytes(path, content)
    files: dict[str, Any] = {path.name: _described(content)}
    for shard in (shard for tensor in index.values() for shard in tensor.shards):
        entry = files.setdefault(shard.file, {"bytes": 0})
        entry["bytes"] += shard.bytes
    return files


def _mark(checkpoint: Path, format: int, files: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    write_json(checkpoint / PROGRESS, progress)
    described = {**files, PROGRESS: _described((checkpoint / PROGRESS).read_bytes())}
    write_json(checkpoint / MARKER, {"format": format, "files": described})


def problem(checkpoint: Path, digests: bool = True) -> str:
    """Return why a committed checkpoint cannot be used ("is damaged: ..."), or an empty string. Checks the marker, file
    sizes and the digests of the JSON files, but not the shards. Without `digests`, those of parts of the index are left
    to `read_part`.
    """
    try:
        if not (checkpoint / MARKER).is_file():
            raise Damaged(f"{MARKER} is not a file")
        marker = _parsed(checkpoint / MARKER, dict)
        if marker.get("format") == 1:
            return _OLD_FORMAT
        _check_files(checkpoint, marker, digests)
        _progress(checkpoint)
    except Damaged as error:
        return f"is damaged: {error}"
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror or error}"
    return ""


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state. Raises `CheckpointError` if it is unreadable or names another step."""
    try:
        return _progress(checkpoint)
    except (Damaged, OSError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}") from None


def check_run(config: TrainConfig, checkpoints: Path) -> None:
    """Raise `ConfigError` if a run's config.yaml is not the one that its newest readable checkpoint was made with."""
    for found in reversed(committed(checkpoints)):
        with suppress(CheckpointError):  # a damaged one is reported when it is restored
            settings = read_progress(found.path).get("settings") or {}
            check_settings(settings, config, found.step, found.path)
            return


def read_index(checkpoint: Path) -> dict[str, IndexedTensor]:
    """Return every tensor by name. Raises `Damaged` unless shards cover each tensor and each file exactly once."""
    files = _files(checkpoint)
    names = [name for name in files if name == INDEX or _is_part(name)]
    if not names:
        raise Damaged(f"{MARKER} names no {INDEX} and no part of it")
    where = names[0] if len(names) == 1 else "the index"
    index = join_parts(_parsed(checkpoint / name, partial(_tensors, name)) for name in sorted(names))
    for name, tensor in index.items():
        if not _tile(tensor.shape, tensor.shards):
            raise Damaged(f"{where}: the shards of {name} do not make up its shape {list(tensor.shape)}")
    _check_spans(index, files, where)
    return index


def parts_of(checkpoint: Path) -> list[str]:
    """Return the names of the parts of an index, sorted; none if it is whole. Raises `Damaged` or `OSError`."""
    return sorted(filter(_is_part, _files(checkpoint)))


def read_part(checkpoint: Path, name: str) -> dict[str, IndexedTensor]:
    """Return the tensors that a part of the index describes, with their shards in the file beside it. Raises `Damaged`
    unless the part has its digest and the shards cover that file exactly once.
    """
    files = _files(checkpoint)
    if _described((checkpoint / name).read_bytes()) != files[name]:
        raise Damaged(f"{name} does not match its digest")
    part = _parsed(checkpoint / name, partial(_tensors, name))
    for shard in (shard for tensor in part.values() for shard in tensor.shards):
        if Path(shard.file).stem != Path(name).stem:
            raise Damaged(f"{name}: a shard is in {shard.file}, which another part describes")
    _check_spans(part, files, name)
    return part


def _files(checkpoint: Path) -> dict[str, Any]:
    """Return the marker's entries of files by name."""
    return _parsed(checkpoint / MARKER, lambda marker: dict(marker["files"]), {"files": {str: {"bytes": int}}})


def _check_spans(index: Mapping[str, IndexedTensor], files: Mapping[str, Any], where: str) -> None:
    """Raise `Damaged` unless the shards cover each of their files exactly once."""
    shards: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for shard in (shard for tensor in index.values() for shard in tensor.shards):
        shards[shard.file].append((shard.start, shard.bytes))
    for file, spans in shards.items():
        reached, has = 0, files.get(file, {}).get("bytes", 0)
        for start, size in sorted(spans):
            if start != reached:
                raise Damaged(f"{where}: shards in {file} overlap or leave a gap at byte {min(start, reached):,}")
            reached += size
        if reached != has:
            raise Damaged(f"{where}: shards end at byte {reached:,} of {file}, which has {has:,}")


def _progress(checkpoint: Path) -> dict[str, Any]:
    progress: dict[str, Any] = _parsed(checkpoint / PROGRESS, dict, _PROGRESS_SHAPE)
    if progress["step"] != int(checkpoint.name.removeprefix("step-")):
        raise Damaged(f"{PROGRESS} is of step {progress['step']}")
    return progress


def _check_files(checkpoint: Path, marker: dict[str, Any], digests: bool) -> None:
    files = marker.get("files")
    if marker.get("format") not in FORMATS or not isinstance(files, dict):
        raise Damaged(f"{MARKER} is not that of a checkpoint of format {' or '.join(map(str, FORMATS))}")
    parts = {INDEX} if marker["format"] == 2 else {name for name in files if _is_part(name)}
    for name in sorted({PROGRESS, *parts, *files}):
        path, wanted, is_json = checkpoint / name, files.get(name), name in (PROGRESS, *parts)
        if not is_json and not _is_shard_file(name):
            raise Damaged(f"{MARKER} names {name[:60]!r}, which is not a file of a checkpoint")
        if not isinstance(wanted, dict) or not _is_count(wanted.get("bytes")):
            raise Damaged(f"{MARKER} does not say how long {name} is")
        if not path.is_file():
            raise Damaged(f"{name} is {'not a file' if path.exists() else 'missing'}")
        if path.stat().st_size != wanted["bytes"]:
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}")
        if is_json and (digests or not _is_part(name)) and _described(path.read_bytes()) != wanted:
            raise Damaged(f"{name} does not match its digest")


def _tensors(file: str, content: Any) -> dict[str, IndexedTensor]:
    return {name: _tensor(file, name, entry) for name, entry in content["tensors"].items()}


def _tensor(file: str, name: str, entry: Any) -> IndexedTensor:
    """Parse and check one entry of the index, in `file`."""
    dtype, shape = _DTYPES[entry["dtype"]], _counts(entry["shape"])
    shards = [
        IndexedShard(**{**one, "offset": _counts(one["offset"]), "shape": _counts(one["shape"])})
        for one in entry["shards"]
    ]
    for shard in shards:
        if not _is_shard_file(shard.file):
            raise Damaged(f"{file}: {name} is in {str(shard.file)[:60]!r}, which is not a file of a checkpoint")
        size = math.prod(shard.shape) * dtype.itemsize
        if not _is_count(shard.start) or not _is_count(shard.bytes) or shard.bytes != size:
            raise Damaged(f"{file}: a shard of {name} needs {size:,} bytes and has {str(shard.bytes)[:30]}")
        if not isinstance(shard.digest, str):
            raise Damaged(f"{file}: a shard of {name} has no digest")
    return IndexedTensor(dtype, shape, shards)


def _tile(shape: tuple[int, ...], shards: Sequence[IndexedShard]) -> bool:
    """Return whether the shards cover the tensor exactly once, in time linear in their number.

    The indicator function of a box is the sum, with alternating signs, of the indicator functions of the orthants at
    its corners. So the shards tile the tensor if and only if their signed corners sum to those of the tensor.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for offset, size, sign in [((0,) * len(shape), shape, -1), *((one.offset, one.shape, 1) for one in shards)]:
        if len(offset) != len(shape) or len(size) != len(shape) or not all(size):
            return False
        for picked in itertools.product((0, 1), repeat=len(shape)):
            corner = tuple(a + b * far for a, b, far in zip(offset, size, picked, strict=True))
            corners[corner] += sign * (-1) ** sum(picked)
    return not any(corners.values())


def _parsed(path: Path, parse: Callable[[Any], T], shape: Any = object) -> T:
    try:
        return parse(read_json(path, shape))
    except UnreadableFileError as error:
        raise Damaged(str(error).replace(str(path), path.name, 1)) from None
    except _MALFORMED as error:
        raise Damaged(f"{path.name} is unreadable ({one_line(error, 120)})") from None


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MAX_DIMS or not all(map(_is_count, values)):
        raise ValueError("an offset or a shape is not a list of counts")
    return tuple(values)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_shard_file(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"rank_\d+\.bin", name) is not None


def _is_part(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"rank_\d+\.json", name) is not None


def _described(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
