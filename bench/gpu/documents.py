"""Packed documents of realistic lengths, and the FLOPs of training on them.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.plan import squared_lengths
from model.config import ModelConfig
from model.flops import mean_lengths, training_flops

LOG_MEAN, LOG_STD = 6.0, 1.3
"""Mean and standard deviation of the logarithm of a length in tokens: a median of 403 and a mean of 940 tokens (735 in
sequences of 8,192, whose last document is cut). Web text is close to log-normal, with many short documents.
"""
SHORTEST = 16


def packed_positions(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return positions in documents, int64 [B, T] on the host. Lengths are log-normal; the last document is cut."""
    generator, found = torch.Generator().manual_seed(seed), torch.arange(length).repeat(rows, 1)
    for row_T in found:
        begin = 0
        while begin < length:
            size = torch.empty(()).log_normal_(LOG_MEAN, LOG_STD, generator=generator)
            end = min(begin + max(int(size), SHORTEST), length)
            row_T[begin:end] = torch.arange(end - begin)
            begin = end
    return found


def count(positions_BT: Tensor) -> int:
    """Return the number of documents."""
    return int((positions_BT == 0).sum())


def packed_flops(model: ModelConfig, positions_BT: Tensor) -> float:
    """Return the FLOPs per token of training on packed documents, counted as in `model.flops`."""
    chunks = {layer.attention_chunk_size for layer in model.blocks}
    squares = {chunk: squared_lengths(positions_BT, chunk) for chunk in chunks}
    return training_flops(model, mean_lengths(squares, positions_BT.numel())).total
