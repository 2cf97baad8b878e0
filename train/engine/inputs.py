"""Copy what a step reads to the device, ahead of the step.

On a GPU the thread that makes batches also pins them and copies them on a stream of its own. A step then waits for an
event on the device, not for a copy, and the host waits for nothing.

Shapes: B sequences, T this rank's part of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.memory import upload
from data.loader import Batch
from model.attention.plan import ForwardContext
from model.vision.fusion import Images
from parallel.parallelize import ParallelModel
from train.engine.images import batch_images, image_positions


@dataclass
class StepInputs:
    """Tokens, labels and the contexts of the micro-batches of one batch, on the device. `images`: those of
    `batch_images`, with their pixels. `ready`: the event after which they are there; None: at once.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    contexts: list[ForwardContext]
    micro_batch_size: int
    images: list[Images | None]
    ready: Any = field(default=None, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        contexts = [x for context in self.contexts for x in context.tensors()]
        images = [x for one in self.images if one is not None for x in one.tensors()]
        return [self.tokens_BT, self.labels_BT, *contexts, *images]


def step_inputs(placed: ParallelModel, batch: Batch, micro_batch_size: int) -> StepInputs:
    """Copy this rank's part of a batch to the device, on the current stream, without waiting."""
    share = placed.context_shard(batch.tokens_BT.shape[1])
    routed = float(batch.tokens_BT.numel() * placed.meshes.dp.size)
    parts = batch.positions_BT.split(micro_batch_size)
    contexts = [placed.sequence_context(part_BT, routed, ahead=True) for part_BT in parts]
    if batch.images is not None:
        is_image_BT = image_positions(placed, batch.images)
        for context, part_BT in zip(contexts, is_image_BT.split(micro_batch_size), strict=True):
            context.is_image_BT = part_BT
    return StepInputs(
        upload(share.take(batch.tokens_BT), placed.device),
        upload(share.take(batch.labels_BT), placed.device),
        contexts,
        micro_batch_size,
        batch_images(placed, batch.images, micro_batch_size),
    )


class AheadCopies:
    """Copies batches ahead of their steps on a stream of its own. `cuda`: the module `torch.cuda`, or a stand-in.

    The memory of the copies belongs to the copying stream. `take` orders the step after the copies and records that the
    step uses their memory, which the allocator must not hand to a later copy before that.
    """

    def __init__(self, placed: ParallelModel, cuda: Any = torch.cuda) -> None:
        self.placed, self.cuda = placed, cuda
        self.stream = cuda.Stream(placed.device)

    def prepare(self, batch: Batch, micro_batch_size: int) -> StepInputs:
        """Start the copies of a batch. Any thread may call it."""
        with self.cuda.stream(self.stream):  # also makes its device this thread's
            inputs = step_inputs(self.placed, batch, micro_batch_size)
            inputs.ready = self.stream.record_event()
        return inputs

    def take(self, inputs: StepInputs) -> StepInputs:
        """Make the current stream wait for the copies, so that it may read them."""
        current = self.cuda.current_stream(self.placed.device)
        current.wait_event(inputs.ready)
        for tensor in inputs.tensors:
            tensor.record_stream(current)
        return inputs
