"""Index, marker and progress of a checkpoint, its shards, and the description of an imported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from core.config import plain
from core.errors import CheckpointError, ConfigError
from model.config import ModelConfig
from tests.fuzz.mutations import assert_reads_or_refuses, files, json_bytes, json_files
from train.checkpoint.files import read_shard, read_state, write_shards
from train.checkpoint.index import (
    INDEX,
    PROGRESS,
    Damaged,
    commit,
    commit_parts,
    problem,
    read_index,
    read_progress,
    write_part,
)
from train.checkpoint.reader import IMPORTED, load_imported, load_origin
from train.checkpoint.state import TensorShard
from train.run_directory import MARKER

SHARDS, PART = "rank_0.bin", "rank_0.json"
STATE = {
    "step": 100,
    "tokens": 9,
    "corpus": "c",
    "vocabulary": "v",
    "settings": {},
    "layout": {},
    "callbacks": {"a": {}},
}


def state() -> list[TensorShard]:
    """Return a matrix in two shards, and a scalar."""
    halves = [TensorShard("model.w", torch.full((2, 3), 0.5), (4, 3), (2 * i, 0)) for i in range(2)]
    return [*halves, TensorShard("optimizer.step", torch.tensor(1.0), (), ())]


@pytest.fixture(scope="module", params=[INDEX, PART])
def checkpoint(place, request) -> tuple[Path, dict[str, bytes]]:
    """Return the folder of a checkpoint and its files. Its index is whole (format 2) or in parts (format 3)."""
    path = place / request.param / "step-00000100"
    path.mkdir(parents=True)
    index = write_shards(path / SHARDS, state())
    if request.param == INDEX:
        commit(path, [index], STATE)
    else:
        commit_parts(path, [write_part(path, 0, index)], STATE)
    return path, {name: (path / name).read_bytes() for name in (request.param, PROGRESS, MARKER, SHARDS)}


def read(checkpoint: Path) -> None:
    """Read all of a checkpoint as resuming does."""
    if wrong := problem(checkpoint):
        assert wrong.isprintable()
        raise CheckpointError(f"{checkpoint} {wrong}")
    read_progress(checkpoint)
    for tensor in read_index(checkpoint).values():
        for shard in tensor.shards:
            read_shard(checkpoint, shard)
    read_state(checkpoint, state())


def signed(marker: bytes, files: dict[str, bytes]) -> bytes:
    """Return the marker with the sizes and digests of these files: a stranger forges them too."""

    content = json.loads(marker)
    for name in sorted({INDEX, PART, PROGRESS} & {*files}):
        digest = xxhash.xxh3_128_hexdigest(files[name])
        content["files"][name] = {"bytes": len(files[name]), "xxh3_128": digest}
    content["files"][SHARDS] = {"bytes": len(files[SHARDS])}
    return json_bytes(content)


@pytest.mark.parametrize("name", ["index", PROGRESS, MARKER, SHARDS])
def test_any_checkpoint_is_read_or_refused(checkpoint, name):

    path, whole = checkpoint
    name = next(iter(whole)) if name == "index" else name
    kind = files(whole[name]) if name == SHARDS else json_files(json.loads(whole[name]))

    @given(kind, st.booleans())
    def check(content, sign):
        found = {**whole, name: content}
        if sign and name != MARKER:
            found[MARKER] = signed(whole[MARKER], found)
        for file, bytes_ in found.items():
            (path / file).write_bytes(bytes_)
        assert_reads_or_refuses(lambda: read(path), CheckpointError, Damaged)
        assert_reads_or_refuses(lambda: read_index(path), Damaged)
        assert_reads_or_refuses(lambda: read_progress(path), CheckpointError)

    check()


DESCRIBED = {
    "model": plain(ModelConfig()),
    "origin": {"family": "llama", "checked": "no", "config": {"eos_token_id": 2}},
}


@given(json_files(DESCRIBED))
def test_any_description_of_a_model_is_read_or_refused(place, content):
    (place / IMPORTED).write_bytes(content)
    assert_reads_or_refuses(lambda: load_imported(place), CheckpointError, ConfigError)
    assert_reads_or_refuses(lambda: load_origin(place), CheckpointError)
