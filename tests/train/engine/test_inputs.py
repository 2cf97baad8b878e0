"""A step neither waits for its inputs on the host nor reads them before they are copied. Meta tensors stand for a GPU's,
and a recording stand-in for `torch.cuda` checks the order of streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.counting import Counter
from data.images.batch import BatchImages
from data.loader import Batch
from model.config import ModelConfig
from model.load_balance import Balancer
from model.vision.config import VisionConfig
from parallel import parallelize
from parallel.layout import ParallelConfig
from precision.config import AttentionKind, Compute, PrecisionConfig
from precision.resolve import resolve
from tests.support.models import meshes_here, small
from train.engine.fsdp import TorchEngine
from train.engine.inputs import AheadCopies, StepInputs
from train.optim.config import OptimizerConfig

GPU, META = torch.device("cuda"), torch.device("meta")
LENGTH, MICRO = 48, 1


class Stream:
    """A stream as a vector clock. `seen`: how far each other stream was when this one last waited for it."""

    def __init__(self, device: Any = None) -> None:
        self.time, self.seen = 0, {}

    def record_event(self) -> tuple[Stream, int]:
        return self, self.time

    def wait_event(self, event: tuple[Stream, int]) -> None:
        stream, time = event
        self.seen[stream] = max(time, self.seen.get(stream, 0))


class Cuda:
    """Stands in for `torch.cuda`."""

    Stream = Stream

    def __init__(self) -> None:
        self.current = Stream()

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Races(TorchDispatchMode):
    """Finds reads of memory that its stream does not follow, and memory that its stream may hand out too early."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda, self.written, self.used, self.recorded, self.found = cuda, {}, {}, set(), []
        self._alive: list[StorageWeakRef] = []

    def key(self, x: Tensor) -> int:
        self._alive.append(StorageWeakRef(x.untyped_storage()))
        return self._alive[-1].cdata

    def record(self, x: Tensor, stream: Stream) -> None:
        self.recorded.add((self.key(x), stream))

    def unrecorded(self) -> list[str]:
        used = [one for one in self.used if self.written[one[0]][0] is not one[1] and one not in self.recorded]
        return [self.used[one] for one in used]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stream = self.cuda.current
        stream.time += 1
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.device == META and (key := self.key(x)) in self.written:
                writer, time = self.written[key]
                self.used[key, stream] = str(operation)
                if writer is not stream and stream.seen.get(writer, 0) < time:
                    self.found.append(f"{operation} reads what may not be there yet")
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device == META:
                self.written.setdefault(self.key(x), (stream, stream.time))
        return result


@pytest.fixture
def engine(monkeypatch) -> TorchEngine:
    return on_meta(small(), monkeypatch)


def on_meta(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """Return an engine on meta tensors with the code that runs on GPUs."""
    monkeypatch.setattr(parallelize, "resolve", lambda config, device: resolve(config, GPU))
    precision = PrecisionConfig(Compute.bfloat16)
    placed = parallelize.build(model, precision, meshes_here(ParallelConfig()), META, 0)
    assert placed.attention is AttentionKind.varlen
    return TorchEngine(placed, OptimizerConfig())


def batch() -> Batch:
    positions = torch.stack([torch.cat([torch.arange(30), torch.arange(18)]), torch.arange(LENGTH)])
    tokens = torch.arange(positions.numel()).view_as(positions) % 64
    return Batch(tokens, tokens.roll(-1, 1), positions, torch.zeros(2, dtype=torch.int64))


def pictures(model: ModelConfig) -> Batch:
    """Return a batch of which each sequence shows a tile."""
    assert model.vision is not None
    one, side, count = batch(), model.vision.tile_size, model.vision.tokens_per_tile
    rows = torch.full((2, LENGTH), -1)
    rows[:, 1 : 1 + count] = torch.arange(count)
    one.images = BatchImages(rows, [[None], [None]], count, None, side)  # type: ignore[list-item]
    one.images.load(lambda tile: np.zeros((3, side, side), np.uint8), MICRO, side)
    return one


class PixelCopies(TorchDispatchMode):
    """Counts the copies of pixels from the host to the device."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default and result.device == META:
            self.count += args[0].device.type == "cpu" and args[0].dtype is torch.uint8
        return result


def step(engine: TorchEngine, one: Batch) -> None:
    """Run a step without the update, since AdamW's fused kernel has no shape function for meta tensors."""
    engine.forward_backward(one, MICRO)
    engine.clip(1.0)
    Balancer(engine.placed.model, lambda x: None).step()
    engine.optimizer.zero_grad(set_to_none=True)


def races(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Races:
    """Run a step whose inputs were copied ahead."""
    cuda = Cuda()
    engine.copies = AheadCopies(engine.placed, cuda)
    with Races(cuda) as checker:
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: checker.record(x, stream))
        one = batch()
        engine.prepare(one, MICRO)
        assert isinstance(one.ahead, StepInputs) and len(one.ahead.tensors) == 2 + 2 * (1 + 2), "two chunk sizes"
        assert not any(context._rotations for context in one.ahead.contexts), "a later step may have another theta"
        step(engine, one)
        assert one.ahead is None and cuda.current.seen
    return checker


def test_a_step_follows_the_copies_of_its_inputs(engine, monkeypatch):
    checker = races(engine, monkeypatch)
    assert not checker.found and not checker.unrecorded() and len(checker.recorded) == 8


def test_a_forgotten_wait_is_noticed(engine, monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", lambda stream, event: stream.seen.update({event[0]: 0}))
    checker = races(engine, monkeypatch)
    assert any("_varlen_attn" in read for read in checker.found) and any("embedding" in r for r in checker.found)


def test_an_event_recorded_too_early_is_noticed(engine, monkeypatch):
    monkeypatch.setattr(Stream, "record_event", lambda stream: (stream, stream.time // 2))
    assert races(engine, monkeypatch).found


def test_unrecorded_memory_is_noticed(engine, monkeypatch):
    everything = StepInputs.tensors.fget
    monkeypatch.setattr(StepInputs, "tensors", property(lambda inputs: [*everything(inputs)[:-1], inputs.tokens_BT]))
    assert len(races(engine, monkeypatch).unrecorded()) == 1


def test_a_step_on_one_device_waits_for_nothing(engine, monkeypatch):
    with Counter() as counter:
        step(engine, batch())
    assert not counter.syncs
    monkeypatch.setattr("train.engine.inputs.upload", lambda x, device: x.to(device))
    with Counter() as counter:
        step(engine, batch())
    assert counter.syncs == {"_to_copy": 2}, "the control"


def test_inputs_are_copied_ahead_once_and_for_their_micro_batch(engine, monkeypatch):
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)
    engine.copies = AheadCopies(engine.placed, Cuda())
    one = batch()
    engine.prepare(one, MICRO)
    ahead = one.ahead
    assert engine._inputs(one, MICRO) is ahead and engine._inputs(one, MICRO) is not ahead
    engine.prepare(one, MICRO)
    assert engine._inputs(one, 2).micro_batch_size == 2


def test_pixels_are_copied_ahead(monkeypatch):
    model = small(
        vision=VisionConfig(
            image_token_id=63,
            tile_size=8,
            patch_size=2,
            hidden_size=64,
            num_layers=1,
            mlp_hidden_size=64,
            adapter_hidden_size=64,
        )
    )
    engine, cuda = on_meta(model, monkeypatch), Cuda()
    engine.copies, recorded = AheadCopies(engine.placed, cuda), []
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: recorded.append(x.dtype))
    one = pictures(model)
    with PixelCopies() as before:
        engine.prepare(one, MICRO)
    with PixelCopies() as within, Counter() as counter:
        step(engine, one)
    assert before.count == 2 and not within.count and not counter.syncs
    assert recorded.count(torch.uint8) == 2 and recorded.count(torch.bool) == 2, "pixels, and where they are"
    with PixelCopies() as within:
        step(engine, pictures(model))
    assert within.count == 2, "the control"
