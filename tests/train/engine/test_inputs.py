"""A step neither waits for its inputs on the host nor reads them before they are copied. Meta tensors stand for a GPU's,
and a recording stand-in for `torch.cuda` checks the order of streams.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.images.batch import BatchImages
from data.loader import Batch
from model.config import ModelConfig
from model.load_balance import Balancer
from model.vision.config import VisionConfig
from parallel import parallelize
from parallel.checks.counting import Counter
from parallel.checks.recorder import recording
from parallel.checks.streams import Event, Race, Stream
from parallel.layout import ParallelConfig
from precision.config import AttentionKind, Compute, PrecisionConfig
from tests.support.models import meshes_here, small
from train.engine.fsdp import TorchEngine
from train.engine.inputs import AheadCopies, StepInputs
from train.optim.config import OptimizerConfig

GPU, META = torch.device("cuda"), torch.device("meta")
LENGTH, MICRO = 48, 1


@pytest.fixture
def engine() -> TorchEngine:
    return on_meta(small())


def on_meta(model: ModelConfig) -> TorchEngine:
    """Return an engine on meta tensors with the code that runs on GPUs."""
    precision = PrecisionConfig(Compute.bfloat16)
    placed = parallelize.build(model, precision, meshes_here(ParallelConfig()), META, 0, kind=GPU)
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


def races(engine: TorchEngine, steps: int = 1) -> list[Race]:
    """Return the races of steps whose inputs are copied ahead, each during the step before."""
    with recording(META.type) as recorder:
        engine.copies = AheadCopies(engine.placed, torch.cpu)  # which gives the recorder's streams
        one = batch()
        engine.prepare(one, MICRO)
        for _ in range(steps):
            assert isinstance(one.ahead, StepInputs) and len(one.ahead.tensors) == 2 + 2 * (1 + 2), "two chunk sizes"
            assert not any(context._rotations for context in one.ahead.contexts), "a later step may have another theta"
            here, one = one, batch()
            step(engine, here)
            assert here.ahead is None
            engine.prepare(one, MICRO)
    return recorder.machine.races


def test_a_step_follows_the_copies_of_its_inputs(engine):
    assert races(engine, steps=2) == []


def test_a_copy_used_too_early_is_noticed(engine, monkeypatch):
    honest = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", lambda stream, event: honest(stream, None))
    found = races(engine)
    assert {one.second for one in found if not one.reused} >= {"_varlen_attn", "embedding"}, found


def test_an_event_recorded_too_early_is_noticed(engine, monkeypatch):
    honest = Stream.record_event
    early = lambda stream: honest(stream) if stream is stream.machine.default else Event(stream.machine)  # noqa: E731
    monkeypatch.setattr(Stream, "record_event", early)
    assert races(engine)


@pytest.mark.parametrize("forgotten", range(2))
def test_a_batch_freed_while_the_next_is_copied_is_noticed(engine, monkeypatch, forgotten):
    everything = StepInputs.tensors.fget
    some = lambda inputs: [x for i, x in enumerate(everything(inputs)) if i != forgotten]  # noqa: E731
    honest = AheadCopies.take

    def take(copies: AheadCopies, inputs: StepInputs) -> StepInputs:
        monkeypatch.setattr(StepInputs, "tensors", property(some))
        taken = honest(copies, inputs)
        monkeypatch.setattr(StepInputs, "tensors", property(everything))
        return taken

    monkeypatch.setattr(AheadCopies, "take", take)
    found = races(engine)
    assert found and all(one.reused and one.first_stream == "the default stream" for one in found), found


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
    engine.copies = AheadCopies(engine.placed, torch.cpu)
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
    engine, one, recorded = on_meta(model), pictures(model), []
    with recording(META.type), PixelCopies() as before:
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: recorded.append(x.dtype))
        engine.copies = AheadCopies(engine.placed, torch.cpu)
        engine.prepare(one, MICRO)
        with PixelCopies() as within, Counter() as counter:
            step(engine, one)
    assert before.count == 2 and not within.count and not counter.syncs
    assert recorded.count(torch.uint8) == 2 and recorded.count(torch.bool) == 2, "pixels, and where they are"
    with PixelCopies() as within:
        step(engine, pictures(model))
    assert within.count == 2, "the control"
