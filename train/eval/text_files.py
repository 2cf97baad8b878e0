"""Compute the loss of the user's text files under a run, an imported model or a model in the Hugging Face format.

Every document begins with BOS, which is not counted. Documents longer than the model's context are split into windows
as in `train.eval.text_loss`, so that every token of the text counts once. Bits per byte are per byte of the text in
UTF-8, so that models with different tokenizers are comparable.

This works under any layout. Every rank reads all files and runs the model equally often.

Shapes: B windows of a micro-batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from core.errors import ConfigError
from data.files import UnreadableFile, find_files, read_rows
from data.filter.config import InputConfig, under
from data.filter.input.readers import MalformedRecord, read_record
from data.loader import IGNORED, Batch
from parallel.comm.world import World
from parallel.fsdp import release
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from parallel.parallelize import ParallelModel, build
from parallel.sharding import fill, local_shards
from precision.config import Compute, PrecisionConfig
from train.eval.held_out import batch_losses, local_batches
from train.eval.scoring_model import ScoringModel, StoredModel, TextTokenizer, TokenWindow
from train.eval.text_loss import windows

GROUP = 1 << 20
"""Tokens, about, that are tokenised and divided over the ranks together."""


@dataclass(frozen=True)
class TextLoss:
    """The mean `loss` in nats per token, and `bits_per_byte`, of the `tokens` and `bytes` of all documents."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int


def text_loss(
    placed: ParallelModel, tokenizer: TextTokenizer, context: int, pattern: str, micro_batch_size: int
) -> TextLoss:
    """Compute the loss of the text in a file, a folder or the files of a glob pattern, divided over the ranks.

    Raises `ConfigError` (key `text`) if the files cannot be read or hold no text.
    """
    placed.model.eval()

    def total(sums: torch.Tensor) -> list[float]:
        placed.meshes.world.sum(sums, "evaluation")
        release(placed.stacks)
        return sums.tolist()

    return _measured(partial(_sums, placed, micro_batch_size=micro_batch_size), total, tokenizer, context, pattern)


def foreign_text_loss(model: ScoringModel, pattern: str, micro_batch_size: int) -> TextLoss:
    """Compute the same for a whole model in this process, such as one of transformers."""

    def sums_of(group: list[TokenWindow]) -> torch.Tensor:
        found = [losses for losses, _ in model.losses(group, micro_batch_size)]
        nats = sum(float(losses.sum(dtype=torch.float64)) for losses in found)
        return torch.tensor([nats, sum(map(len, found))], dtype=torch.float64)

    context = min(model.context, GROUP)
    return _measured(sums_of, torch.Tensor.tolist, model.tokenizer, context, pattern)


def _measured(
    sums_of: Callable[[list[TokenWindow]], torch.Tensor],
    total: Callable[[torch.Tensor], list[float]],
    tokenizer: TextTokenizer,
    context: int,
    pattern: str,
) -> TextLoss:
    """`sums_of` returns this rank's nats and tokens of some windows, and `total` the sums of all ranks."""
    sums = sums_of([])
    size = documents = 0
    group: list[TokenWindow] = []
    for text in read_texts(pattern):
        ids = tokenizer.encode([text])[0]
        size, documents = size + len(text.encode()), documents + 1
        group += windows(documents, [tokenizer.bos_id, *ids], len(ids), context)
        if sum(len(window.ids) for window in group) >= GROUP:
            sums, group = sums + sums_of(group), []
    nats, tokens = total(sums + sums_of(group))
    if not tokens:
        raise ConfigError("text", pattern, "holds no text")
    return TextLoss(nats / tokens, nats / size / math.log(2), int(tokens), size, documents)


def read_texts(pattern: str) -> Iterator[str]:
    """Yield each document: a text file, or the field `text` of a line of jsonl or a row of parquet."""
    with under("text"):
        files = find_files(pattern)
    for name, path in files:
        try:
            for number, row in read_rows(path):
                record = read_record(InputConfig(input=pattern), row, f"{name}:{number}")
                if isinstance(record, MalformedRecord):
                    raise ConfigError("text", record.source, f"cannot be read: {record.reason}")
                yield record.text
        except UnreadableFile as error:
            raise ConfigError("text", str(path), f"cannot be read: {error}") from None


def place(stored: StoredModel, world: World) -> ParallelModel:
    """Load a model that is not a run in float32, sharded over all ranks."""
    meshes = make_meshes(ParallelConfig().resolve(world.size), world)
    placed = build(stored.source.config, PrecisionConfig(Compute.float32), meshes, world.device, seed=0)
    fill(local_shards(placed.model, placed.specs), stored.source)
    return placed


@torch.no_grad()
def _sums(placed: ParallelModel, group: list[TokenWindow], micro_batch_size: int) -> torch.Tensor:
    """Return this rank's nats and tokens of these windows."""
    sums = torch.zeros(2, dtype=torch.float64, device=placed.device)
    for length, some in _by_length(group):
        take = partial(_batch, some, placed.padded_length(length))
        for _, batch in local_batches(take, len(some), micro_batch_size, placed.meshes.dp):
            if (losses := batch_losses(placed, batch)) is not None:
                losses_BT, labels_BT = losses
                sums += torch.stack([losses_BT.sum(dtype=torch.float64), (labels_BT != IGNORED).sum().double()])
    return sums


def _by_length(group: Iterable[TokenWindow]) -> Iterator[tuple[int, list[TokenWindow]]]:
    """Yield windows of similar length with their longest length, so that padding at most doubles the work."""
    found: dict[int, list[TokenWindow]] = {}
    for window in group:
        found.setdefault((len(window.ids) - 2).bit_length(), []).append(window)
    for some in found.values():
        yield max(len(window.ids) for window in some) - 1, some


def _batch(some: list[TokenWindow], length: int, start: int, stop: int) -> Batch:
    tokens_BT = torch.zeros(stop - start, length, dtype=torch.int64)
    labels_BT = torch.full_like(tokens_BT, IGNORED)
    for row, window in enumerate(some[start:stop]):
        last = len(window.ids) - 1
        tokens_BT[row, :last] = torch.tensor(window.ids[:-1])
        labels_BT[row, last - window.counted : last] = torch.tensor(window.ids[-window.counted :])
    positions_BT = torch.arange(length).expand(tokens_BT.shape)
    return Batch(tokens_BT, labels_BT, positions_BT, torch.zeros(stop - start, dtype=torch.int64))
