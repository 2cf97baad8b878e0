"""Checkpoints in an object store: a local server that speaks S3, saves, damaged objects, and kills during a save."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from core.files import locate
from parallel.comm.world import World
from train.checkpoint.index import problem
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import TensorShard
from train.run_directory import committed

MISSING = [name for name in ("moto", "flask", "s3fs") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not found: pip install 'moto[server]' s3fs"),
]
KILLS = 8
WRITER = """
import sys, torch
from tests.train.checkpoint import test_object_store as test
saver = test.checkpointer(sys.argv[1])
for step in range(int(sys.argv[2]), 1000):
    saver.save(step, test.state(step), {})
    print(step, flush=True)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Start a server in memory and yield the URL of an empty bucket."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    variables |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.1)
            store = locate("s3://bucket").fs  # type: ignore[attr-defined]
            store.mkdir("bucket")
            yield "s3://bucket"
        finally:
            server.kill()
            server.wait()


def checkpointer(url: str, said: list[str] | None = None) -> Checkpointer:
    report = (said if said is not None else []).append
    return Checkpointer(locate(url), World(0, 1, torch.device("cpu")), keep=2, asynchronous=True, report=report)


def state(step: int) -> list[TensorShard]:
    """Return 8 MB, so that objects are sent in several parts."""
    return [TensorShard(name, torch.full((1 << 20,), step + one), (1 << 20,), (0,)) for one, name in enumerate("ab")]


def restored(saver: Checkpointer) -> tuple[int, float]:
    found = [TensorShard(one.name, torch.zeros_like(one.tensor), one.shape, one.offset) for one in state(0)]
    progress = saver.restore(found)
    assert progress is not None
    return progress["step"], found[1].tensor.unique().item()


def test_a_store_keeps_checkpoints(bucket):
    said: list[str] = []
    saver = checkpointer(f"{bucket}/kept", said)
    for step in (1, 2, 3):
        saver.save(step, state(step), {})
    saver.wait()
    assert said == [] and [one.step for one in committed(saver.directory)] == [2, 3]
    assert restored(checkpointer(f"{bucket}/kept")) == (3, 4)
    shards = saver.directory / "step-00000003" / "rank_0.bin"
    content = bytearray(shards.read_bytes())
    content[-1] ^= 1
    shards.write_bytes(bytes(content))
    again = checkpointer(f"{bucket}/kept", said)
    assert restored(again) == (2, 3) and "rank_0.bin does not match its digest" in said[0]
    again.save(3, state(3), {})
    again.wait()
    assert restored(checkpointer(f"{bucket}/kept")) == (3, 4), "the damaged one was replaced"


def test_kills_leave_nothing_half_written_that_looks_whole(bucket):
    draw, url, step, partial = random.Random(0), f"{bucket}/killed", 1, 0
    for _ in range(KILLS):
        line = [sys.executable, "-c", WRITER, url, str(step)]
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        ) as writer:
            assert writer.stdout is not None
            while int(writer.stdout.readline() or -1) not in (-1, step + 1):
                pass
            time.sleep(draw.uniform(0, 0.4))
            writer.send_signal(signal.SIGKILL)
        folder = checkpointer(url).directory
        folder.fs.invalidate_cache()  # type: ignore[attr-defined]
        whole = committed(folder)
        assert whole and all(problem(one.path) == "" for one in whole)
        newest = whole[-1].step
        assert restored(checkpointer(url)) == (newest, newest + 1) and newest >= step
        partial += len({path.name for path in folder.iterdir()}) > len(whole)
        step = newest + 1
    assert partial, "control: no kill interrupted a save"
