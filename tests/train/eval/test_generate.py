"""Texts generated with cached keys and values are those generated without, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import LeviathanError
from model.attention.cache import TokenContext
from model.attention.plan import ForwardContext
from model.transformer import Transformer
from model.vision.config import VisionConfig
from tests.model.attention.test_cache import FAMILIES, rotated_too_far
from tests.support.bugs import bound
from tests.support.models import build
from train.eval.config import GenerateConfig
from train.eval.generate import CachedModel, Continuation, batches, continue_batch, continue_tokens
from train.eval.lm_eval import HarnessModel
from train.eval.multimodal import place_tiles
from train.eval.scoring_model import ScoringModel

CONTEXT, NO_STOP = 24, -1
PROMPTS = [[5, 6, 7], [(7 * i) % 64 for i in range(11)], [9], [3] * 40]
"""One is longer than the context."""
GREEDY = GenerateConfig(run="", tokens=16, temperature=0)
SAMPLED = GenerateConfig(run="", tokens=16, temperature=0.9, top_k=20, seed=5)


@torch.no_grad()
def without(model: Transformer, prompt: list[int], config: GenerateConfig, stop: int = NO_STOP) -> list[int]:
    return list(continue_tokens(lambda ids: model(torch.tensor([ids]))[0, -1], prompt, CONTEXT, config, stop))


def with_cache(
    model: Transformer, prompts: Sequence[list[int]], config: GenerateConfig, stop: int = NO_STOP
) -> list[list[int]]:
    asked = [Continuation(prompt, config) for prompt in prompts]
    continue_batch(CachedModel(model, CONTEXT), asked, stop)
    return [one.found for one in asked]


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_continues_like_each_text_alone(config):
    """Past the borders of chunks and past the context."""
    model = build(FAMILIES["llama4"], seed=1)
    expected = [without(model, prompt, config) for prompt in PROMPTS]
    assert with_cache(model, PROMPTS, config) == expected
    assert len({tuple(found) for found in expected}) == len(PROMPTS)


def test_texts_that_end_leave_the_batch(monkeypatch):
    model = build(FAMILIES["llama4"], seed=1)
    free = with_cache(model, PROMPTS, SAMPLED)
    stop = free[1][4]
    sizes: list[int] = []
    honest = CachedModel.extend
    monkeypatch.setattr(CachedModel, "extend", lambda self, ids: (sizes.append(len(ids)), honest(self, ids))[1])
    found = with_cache(model, PROMPTS, SAMPLED, stop)
    assert found == [without(model, prompt, SAMPLED, stop) for prompt in PROMPTS]
    assert len(found[1]) <= 4 and sizes[0] == len(PROMPTS) > sizes[-1] and sizes == sorted(sizes, reverse=True)


def test_positions_that_are_off_by_one_are_noticed(monkeypatch):
    model = build(FAMILIES["llama4"], seed=1)
    expected = [without(model, prompt, SAMPLED) for prompt in PROMPTS[:3]]
    monkeypatch.setattr(TokenContext, "__init__", bound(rotated_too_far, TokenContext.__init__))
    assert with_cache(model, PROMPTS[:3], SAMPLED) != expected


def test_one_text_reads_each_token_once(monkeypatch):
    model, read = build(FAMILIES["llama4"], seed=1), []
    run = CachedModel._run
    monkeypatch.setattr(CachedModel, "_run", lambda *given: (read.append(given[1].shape[1]), run(*given))[1])
    cached = CachedModel(model, CONTEXT)
    for _ in range(2):  # the second text does not see the first one
        found = list(continue_tokens(cached.next_logits(), PROMPTS[1], CONTEXT, SAMPLED, NO_STOP))
        assert found == without(model, PROMPTS[1], SAMPLED)
    room = CONTEXT - len(PROMPTS[1])
    assert read[:16] == [len(PROMPTS[1]), *[1] * room, CONTEXT, CONTEXT], "a full window is read whole"


def test_nan_is_an_error():
    model = build(FAMILIES["llama4"], seed=1)
    torch.nn.init.constant_(model.final_norm.weight, torch.nan)  # type: ignore[union-attr]
    with pytest.raises(LeviathanError, match="computes NaN"):
        with_cache(model, PROMPTS[:2], GREEDY)


VISION = VisionConfig(
    hidden_size=16, num_layers=1, num_heads=2, mlp_hidden_size=16, adapter_hidden_size=16, tile_size=8, patch_size=2,
    image_token_id=63,
)  # fmt: skip


@torch.no_grad()
def test_pictures_before_texts_of_a_batch():
    """One prompt has two pictures, one has none. A generated placeholder shows no picture."""
    model = build(replace(FAMILIES["llama4"], vision=VISION), seed=1)
    cpu, picture = torch.device("cpu"), [63] * VISION.tokens_per_tile
    prompts = [[0, *picture, 5], [0, 4, 4], [0, *picture, 8, *picture, 9, 9]]
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (n, 3, 8, 8), generator=generator).to(torch.uint8) for n in (1, 0, 2)]
    cached = CachedModel(model, 64)

    def begin(tiles: Tensor) -> Tensor:
        return cached.begin(prompts, lambda tokens_BT: place_tiles(tokens_BT, tiles, 63, cpu))

    def whole(index: int, more: list[int]) -> Tensor:
        tokens_BT = torch.tensor([prompts[index] + more])
        given = ForwardContext(torch.arange(tokens_BT.shape[1])[None])
        given.images = place_tiles(tokens_BT, pixels[index], 63, cpu, len(prompts[index]))
        return model(tokens_BT, given)[0, -1]

    found, more = [begin(torch.cat(pixels))], [7, 63, 2]
    found += [cached.extend([token] * 3) for token in more]
    for length, logits_BV in enumerate(found):
        for index, logits_V in enumerate(logits_BV):
            torch.testing.assert_close(logits_V, whole(index, more[:length]), rtol=0, atol=1e-10)
    differs = (begin(torch.cat(pixels).flip(0)) - found[0]).abs().amax(1) > 1e-6
    assert differs.tolist() == [True, False, True], "control: other pictures"


def test_a_window_with_pictures_does_not_move():
    """Its pictures are read once, so texts that need a moving window are continued apart."""
    asked = [Continuation([1] * length, GREEDY) for length in (3, 9, 5)]
    shown = [Continuation([1] * length, GREEDY, pixels_N3SS=torch.zeros(1, 3, 8, 8)) for length in (4, 8)]
    found = [[len(one.prompt) for one in batch] for batch in batches([shown[0], *asked, shown[1]], 2)]
    assert found == [[9, 5], [3], [8, 4]]
    model = build(replace(FAMILIES["llama4"], vision=VISION), seed=1)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    place = partial(place_tiles, pixels_N3SS=pixels, placeholder=63, device=torch.device("cpu"))
    for images in (None, place):
        cached, prompt = CachedModel(model, VISION.tokens_per_tile + 1), [0, *[63] * VISION.tokens_per_tile]
        if images is None:  # control: a text's window moves
            cached.begin([[1] * len(prompt)])
            cached.extend([3])
        else:
            cached.begin([prompt], images)
            with pytest.raises(ValueError, match="no room"):
                cached.extend([3])


class Letters:
    """A tokenizer whose tokens are single characters."""

    bos_id, eos_id = 0, NO_STOP

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1 + ord(letter) % 60 for letter in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(64 + i) for i in ids)


def test_requests_of_the_harness_run_in_batches(monkeypatch):
    """Each with its own stop strings, limit and temperature, in the order in which they were asked."""
    model, sizes = build(FAMILIES["llama4"], seed=1), []

    def logits(tokens_BT: Tensor) -> Tensor:
        return model(tokens_BT, ForwardContext(torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)))

    harness = HarnessModel(ScoringModel(model, logits, Letters(), 64, ()), 3)
    options: list[dict[str, Any]] = [
        {"max_gen_toks": 3},
        {"max_gen_toks": 20, "until": []},
        {"max_gen_toks": 9, "until": "Z", "temperature": 0.8, "do_sample": True},
        {"max_gen_toks": 9, "temperature": 0.8, "do_sample": False},
    ]
    prompts = ["the model", "a", "of the house", "reads a line"]
    ask = [SimpleNamespace(args=(prompt, dict(one))) for prompt, one in zip(prompts, options, strict=True)]
    stop = harness.generate_until(ask)[1][7:9]
    first, greedy_9, wild = (
        harness.generate_until([SimpleNamespace(args=("a", {"max_gen_toks": 9, **one}))])
        for one in ({"temperature": 9.0, "do_sample": True, "top_k": 1}, {}, {"temperature": 9.0, "do_sample": True})
    )
    assert first == greedy_9 != wild, "top_k counts; control: sampled from all"
    ask[1].args[1]["until"] = [stop, "never said"]
    begin = CachedModel.begin
    monkeypatch.setattr(CachedModel, "begin", lambda *given: (sizes.append(len(given[1])), begin(*given))[1])
    found = harness.generate_until(ask)
    assert sizes == [3, 1]
    assert found == [text for one in ask for text in HarnessModel(harness.model, 1).generate_until([one])]
    ids, greedy = harness.tok_encode("a"), GenerateConfig(run="", tokens=20, temperature=0)
    text = Letters().decode(without(model, ids, greedy))
    assert [len(one) for one in found[::3]] == [3, 9] and found[1] == text[: text.find(stop)] and len(found[1]) <= 7
