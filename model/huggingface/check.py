"""The last word on a conversion: the same logits from our model and from transformers'."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from model.source import TensorSource, whole
from model.transformer import Transformer
from precision.backend import Compute, PrecisionConfig, resolve

TOLERANCE = 5e-5
"""Largest difference of a logit, relative to the largest logit (at least 1), float32."""


def materialise(source: TensorSource, dtype: torch.dtype | None = None) -> Transformer:
    """The whole model in float32 on the CPU; `dtype` rounds each weight to that format on the way."""
    with torch.device("meta"):
        model = Transformer(source.config, resolve(PrecisionConfig(Compute.float32)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = whole(source, name)
            parameter.copy_(tensor.to(dtype) if dtype else tensor)
    for buffer_name, buffer in model.named_buffers():
        buffer.fill_(1 if buffer_name.endswith("load_E") else 0)
    return model.eval()


def obstacle(source: TensorSource) -> str | None:
    """Why logits cannot be compared here, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    elements = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    need, have = 2 * 4 * elements, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > 0.8 * have:
        return f"both models need {need / 1e9:.0f} GB of memory and {have / 1e9:.0f} GB are free"
    return None


@torch.no_grad()
def compare_logits(source: TensorSource, directory: Path, dtype: torch.dtype | None = None) -> float:
    """Largest relative difference of logits between `source` and what transformers loads from `directory`.

    Raises `CheckpointError` where it exceeds `TOLERANCE` or transformers misses or ignores a tensor.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    theirs, report = loaded
    odd = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]]
    odd = [name for name in odd if "vision" not in str(name) and "multi_modal" not in str(name)]
    if odd:
        raise CheckpointError(f"transformers does not load {odd[0]} of {directory} as we do")
    ours = materialise(source, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, source.config.vocab_size, (2, 33), generator=generator)
    expected, found = theirs.eval()(tokens).logits.float(), ours(tokens)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"logits differ from transformers' by {difference:.1e} of the largest (at most {TOLERANCE:.0e})"
        )
    return difference
