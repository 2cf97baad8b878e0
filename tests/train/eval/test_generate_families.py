"""Every preset, at a tiny size, generates the same tokens with and without cached keys and values. Controls break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config import load
from model.attention.cache import KeyValueCache
from model.attention.plan import ForwardContext
from model.config import InitConfig, LatentConfig, ModelConfig, MultipliersConfig
from model.transformer import Transformer
from tests.model.attention.test_cache import BUGS
from tests.support.bugs import bound
from tests.support.models import build
from tests.train.eval.test_generate import GREEDY, NO_STOP, VISION, with_cache, without
from train.config import TrainConfig
from train.eval.generate import CachedModel, Continuation, continue_batch
from train.eval.multimodal import place_tiles

PRESETS = sorted(path.stem for path in (Path(__file__).parents[3] / "configs/model").glob("*.yaml"))
CHUNK = 5
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "dense_hidden_size": 24, "expert_hidden_size": 16, "num_experts": 8, "temperature_floor": 3.0,
    "init": InitConfig(std=1.0, fan_in=True), "multipliers": MultipliersConfig(attention=4.0),
}  # fmt: skip
NEW = 10
SHORT = replace(GREEDY, tokens=NEW)
PROMPTS = [[5, 6, 7], [(7 * i) % 64 for i in range(11)], [9], [(5 * i) % 64 for i in range(CHUNK)]]
"""They end within a chunk, behind the borders of two, after one token, and at a border. Continuations cross borders."""
PACKED = [[3, 4], [9, 2, 8, 6, 5, 1, 7], [4], [6, 6, 1]]
"""Documents of packed prompts. The first two fill a chunk's border, and the second is longer than a chunk."""


@cache
def tiny(name: str) -> Transformer:
    """Return a preset's kinds of layers in small sizes: two layers, the second without positions if any is."""
    config: ModelConfig = load("train", TrainConfig, [f"model={name}"]).model
    changed = dict(SIZES)
    if config.num_kv_heads == config.num_heads:
        changed["num_kv_heads"] = changed["num_heads"]
    if config.shared_expert_hidden_size:
        changed["shared_expert_hidden_size"] = 16
    if config.attention_chunk_size is not None:
        changed["attention_chunk_size"] = CHUNK
    if config.rope_scaling is not None:
        changed["rope_scaling"] = replace(config.rope_scaling, original_seq_len=4)
    if config.latent is not None:
        changed["latent"] = LatentConfig(kv_rank=12, query_rank=10, rope_dim=4, value_dim=6)
    if config.rope_yarn is not None:
        changed["rope_yarn"] = replace(config.rope_yarn, original_seq_len=4)
    if config.router.groups > 1:
        changed["router"] = replace(config.router, top_k=4, groups=4, top_groups=2)
    changed["first_dense"] = min(config.first_dense, 1)
    if config.nope_every:
        changed["nope_every"] = 2
    if config.vision is not None:
        changed["vision"] = VISION
    return build(replace(config, **changed), seed=1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_of_any_preset_continues_alike(name):
    model = tiny(name)
    expected = [without(model, prompt, SHORT) for prompt in PROMPTS]
    assert with_cache(model, PROMPTS, SHORT) == expected
    assert len({tuple(found) for found in expected}) == len(PROMPTS), "control: the prompts matter"


@pytest.mark.parametrize("name", ["llama4_scout", "llama4_maverick", "smoke_vision"])
def test_a_batch_with_pictures_continues_alike(name):
    model, cpu = tiny(name), torch.device("cpu")
    picture = [VISION.image_token_id] * VISION.tokens_per_tile
    prompts = [[0, *picture, 5], [0, *picture, 8, *picture, 9, 9]]
    pixels = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def found(tiles: Tensor) -> list[list[int]]:
        asked = [Continuation(prompt, SHORT) for prompt in prompts]
        place = partial(place_tiles, pixels_N3SS=tiles, placeholder=VISION.image_token_id, device=cpu)
        continue_batch(CachedModel(model, 64), asked, NO_STOP, place)
        return [one.found for one in asked]

    @torch.no_grad()
    def alone(prompt: list[int], tiles: Tensor) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW):
            tokens_BT = torch.tensor([tokens])
            given = ForwardContext(torch.arange(len(tokens))[None])
            given.images = place_tiles(tokens_BT, tiles, VISION.image_token_id, cpu, len(prompt))
            tokens.append(int(model(tokens_BT, given)[0, -1].argmax()))
        return tokens[len(prompt) :]

    expected = [alone(prompts[0], pixels[:1]), alone(prompts[1], pixels[1:])]
    assert found(pixels) == expected != found(pixels.flip(0)), "control: other pictures"


def packed(documents: list[list[int]]) -> tuple[list[int], list[int]]:
    """Return the tokens of documents in one sequence, and their positions."""
    return [t for one in documents for t in one], [p for one in documents for p in range(len(one))]


@torch.no_grad()
def continue_packed(model: Transformer, prompts: list[list[list[int]]], new: int) -> list[list[int]]:
    """Continue the last document of each packed prompt, with the cache."""
    rows = [packed(one) for one in prompts]
    longest = max(len(tokens) for tokens, _ in rows)
    pad = [(tokens + [0] * (longest - len(tokens)), [*p, *range(longest - len(p))]) for tokens, p in rows]
    tokens_BT, positions_BT = (torch.tensor([row[i] for row in pad]) for i in (0, 1))
    store = KeyValueCache()
    given = store.prompts([len(tokens) for tokens, _ in rows], positions_BT=positions_BT)
    found = [model(tokens_BT, given)[:, -1].argmax(-1)]
    while len(found) < new:
        found.append(model(found[-1][:, None], store.next_token())[:, -1].argmax(-1))
    return torch.stack(found, 1).tolist()


@torch.no_grad()
def continue_packed_without(model: Transformer, documents: list[list[int]], new: int) -> list[int]:
    """Continue the last document by passes over the whole packed sequence."""
    tokens, positions = packed(documents)
    for _ in range(new):
        logits_TV = model(torch.tensor([tokens]), ForwardContext(torch.tensor([positions])))[0]
        tokens, positions = [*tokens, int(logits_TV[-1].argmax())], [*positions, positions[-1] + 1]
    return tokens[-new:]


@pytest.mark.parametrize("name", PRESETS)
def test_packed_prompts_of_any_preset_continue_alike(name):
    """Their last documents are of 7, 1 and 3 tokens and begin anywhere in a chunk."""
    model, prompts, new = tiny(name), [PACKED[:2], PACKED[:3], PACKED], NEW
    found = continue_packed(model, prompts, new)
    assert found == [continue_packed_without(model, one, new) for one in prompts]
    assert found == [continue_packed_without(model, one[-1:], new) for one in prompts], "earlier documents are not seen"
    assert found != [continue_packed_without(model, [packed(one)[0]], new) for one in prompts], "control: one document"


SHIFT: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "the last document is where the prompt ends": [
        (KeyValueCache, "prompts", lambda honest, self, lengths, device=None, **packed: honest(self, lengths, device))
    ],
}


@pytest.mark.parametrize("bug", [*BUGS, *SHIFT])
def test_a_broken_cache_changes_the_tokens(bug, monkeypatch):
    model, prompts = tiny("llama4_scout_text"), [PACKED[:2], PACKED[:3], PACKED]
    for owner, name, function in (BUGS | SHIFT)[bug]:
        monkeypatch.setattr(owner, name, bound(function, getattr(owner, name)))
    expected = [continue_packed_without(model, one, NEW) for one in prompts]
    assert continue_packed(model, prompts, NEW) != expected
    if bug in BUGS:
        assert with_cache(model, PROMPTS, SHORT) != [without(model, prompt, SHORT) for prompt in PROMPTS]
