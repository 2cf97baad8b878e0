"""Compare generation with a cache of keys and values to generation without it, and to transformers' `generate`.

The smoke model with initial weights, float32, one thread, greedy, 200 new tokens in a context of 256. transformers has
the same weights, by an export, and its own cache. The tokens of both sides are compared before anything is timed.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Result, interleaved, median_ratio, spread
from bench.peers import LLAMA4
from core.config import load
from model.config import ModelConfig
from model.huggingface import export
from model.init import initialise
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from train.config import TrainConfig
from train.eval.config import GenerateConfig
from train.eval.generate import CachedModel, Continuation, continue_batch, continue_tokens

CONTEXT, PROMPT, NEW = 256, 32, 200
GREEDY = GenerateConfig(run="", tokens=NEW, temperature=0)
NO_STOP = -1


def smoke_model() -> Transformer:
    config = load("train", TrainConfig, ["hparam=none", "model.balance.bias_rate=0"]).model
    model = Transformer(config, resolve(PrecisionConfig(Compute.float32)))
    initialise(model, replace(config, init=replace(config.init, head_std=1.0)), seed=0)  # no two logits tie
    return model.eval()


class ModelInMemory:
    """A model as a source of tensors, to export it."""

    def __init__(self, model: Transformer) -> None:
        self.config: ModelConfig = model.config
        self.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.parameters.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self.parameters.items()}

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self.parameters[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def in_transformers(model: Transformer) -> Any:
    import transformers

    with tempfile.TemporaryDirectory() as root:
        export(ModelInMemory(model), Path(root) / "model", extra_config={"max_position_embeddings": CONTEXT})
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(root) / "model", dtype=torch.float32)
    found.generation_config = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return found.eval()


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (count, PROMPT), generator=generator).tolist()


def cached(model: Transformer, asked: list[list[int]]) -> list[list[int]]:
    batch = [Continuation(prompt, GREEDY) for prompt in asked]
    continue_batch(CachedModel(model, CONTEXT), batch, NO_STOP)
    return [one.found for one in batch]


@torch.no_grad()
def whole_windows(model: Transformer, prompt: list[int]) -> list[int]:
    return list(continue_tokens(lambda tokens: model(torch.tensor([tokens]))[0, -1], prompt, CONTEXT, GREEDY, NO_STOP))


def compared(
    name: str, sides: Sequence[Callable[[], object]], sequences: tuple[int, int], least: float, rounds: int
) -> Result:
    """Compare tokens per second. `sequences`: how many sequences each side continues."""
    a, b = interleaved(sides, rounds, warmup=1, clock=time.process_time)
    ratio = sequences[0] / sequences[1] / median_ratio(a, b)
    note = f"{NEW} new tokens, CPU seconds of one thread, median of {rounds} pairs, spread {spread(a):.0%}"
    ours, theirs = (count * NEW / statistics.median(times) for count, times in zip(sequences, (a, b), strict=True))
    return Result(f"{name} (tokens/s)", ours, theirs, ratio, f">= {least} times", ratio >= least, note)


def assert_equal(ours: list[list[int]], theirs: list[list[int]]) -> None:
    if ours != theirs:
        raise AssertionError("the generated tokens differ: their times say nothing")


def run() -> Iterator[Result]:
    torch.set_num_threads(1)
    model = smoke_model()
    if LLAMA4.missing:
        note = f"not measured, {LLAMA4.missing}"
        yield Result("generation vs transformers' generate", math.nan, math.nan, math.nan, "-", True, note)
    else:
        peer = in_transformers(model)
        yield from (against_transformers(model, peer, count) for count in (1, 8))
    for count in (1, 8):
        asked = prompts(count, model.config.vocab_size)
        without = partial(whole_windows, model, asked[0])
        assert_equal(cached(model, asked)[:1], [without()])
        title = f"generation with a cache, batch of {count}, vs without a cache"
        yield compared(title, [partial(cached, model, asked), without], (count, 1), 5.0, rounds=5)


def against_transformers(model: Transformer, peer: Any, count: int) -> Result:
    asked = prompts(count, model.config.vocab_size)
    tokens_BT = torch.tensor(asked)

    def theirs() -> Tensor:
        return peer.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT))[:, PROMPT:]

    assert_equal(cached(model, asked), theirs().tolist())
    title = f"generation vs transformers' generate, batch of {count}"
    return compared(title, [partial(cached, model, asked), theirs], (count, count), 1.0, rounds=5)
