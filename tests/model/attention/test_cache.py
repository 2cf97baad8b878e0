"""Logits computed with a cache of keys and values are those of the whole sequences. Controls break the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import cache
from model.attention.cache import KeyValueCache, TokenContext
from model.attention.plan import AttentionPlan
from model.config import (
    InitConfig,
    LatentConfig,
    ModelConfig,
    QKNorm,
    RopePairing,
    RopeScaling,
    RouterConfig,
    Score,
    WeightsOn,
    YarnScaling,
)
from model.moe import LocalDispatcher, TopKRouting, permute_by_expert, permute_on_host
from model.transformer import Transformer
from tests.support.bugs import bound
from tests.support.models import build, small
from tests.support.operations import Observed

LLAMA4 = small(attention_chunk_size=5, temperature_floor=3.0, init=InitConfig(std=1.0, fan_in=True))
PLAIN: dict[str, Any] = {
    "nope_every": 0,
    "attention_chunk_size": None,
    "rope_pairing": RopePairing.halves,
    "moe_every": 1,
    "shared_expert_hidden_size": 0,
}
SOFTMAX = RouterConfig(top_k=2, score=Score.softmax, weights_on=WeightsOn.output)
FAMILIES = {
    "llama4": LLAMA4,
    "llama4_scaled": replace(LLAMA4, rope_scaling=RopeScaling(original_seq_len=4), router=RouterConfig(top_k=2)),
    "long_chunks": replace(LLAMA4, attention_chunk_size=64),
    "mixtral": replace(LLAMA4, **PLAIN, qk_norm=QKNorm.none, router=replace(SOFTMAX, norm_topk_prob=True)),
    "qwen3_moe": replace(LLAMA4, **PLAIN, qk_norm=QKNorm.per_head, router=replace(SOFTMAX, norm_topk_prob=True)),
    "olmoe": replace(LLAMA4, **PLAIN, qk_norm=QKNorm.full, num_kv_heads=4, router=SOFTMAX),
    "latent": replace(
        LLAMA4,
        **PLAIN | {"rope_pairing": RopePairing.adjacent},
        qk_norm=QKNorm.none,
        num_kv_heads=4,
        latent=LatentConfig(kv_rank=12, query_rank=None, rope_dim=4, value_dim=6),
        rope_yarn=YarnScaling(4.0, 8, mscale=1.0, mscale_all_dim=0.5),
    ),
    "dense": replace(LLAMA4, **{**PLAIN, "moe_every": 0}, qk_norm=QKNorm.none, tie_embeddings=True),
}
LENGTHS = (3, 11, 5, 1)
"""Prompts that end inside a chunk, behind a border of chunks, and at one."""
NEW = 9


def texts(lengths: Sequence[int] = LENGTHS, new: int = NEW) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, LLAMA4.vocab_size, (length + new,), generator=generator) for length in lengths]


@torch.no_grad()
def with_cache(model: Transformer, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    """Return the logits [1 + NEW, V] after each prompt and each of the tokens that follow it."""
    rows = texts(lengths)
    prompts_BT = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for row, (text, length) in enumerate(zip(rows, lengths, strict=True)):
        prompts_BT[row, :length] = text[:length]
    store = KeyValueCache()
    found = [model(prompts_BT, store.prompts(lengths))[:, 0]]
    for step in range(NEW):
        tokens_B1 = torch.stack([text[length + step] for text, length in zip(rows, lengths, strict=True)])[:, None]
        found.append(model(tokens_B1, store.next_token())[:, 0])
    return list(torch.stack(found, 1))


@torch.no_grad()
def without(model: Transformer, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    return [model(text[None])[0, length - 1 :] for text, length in zip(texts(lengths), lengths, strict=True)]


def largest_difference(config: ModelConfig, lengths: Sequence[int] = LENGTHS) -> float:
    model = build(config, seed=1)
    pairs = zip(with_cache(model, lengths), without(model, lengths), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (4, 4)], ids=["mixed", "alone", "equal"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_whole_sequences(name, lengths):
    assert largest_difference(FAMILIES[name], lengths) < 1e-10


@pytest.mark.parametrize("name", ["_SPARE_SLOTS", "_AHEAD"])
def test_slots_and_prepared_positions_grow(name, monkeypatch):
    monkeypatch.setattr(cache, name, 2)
    assert largest_difference(LLAMA4) < 1e-10


def rotated_too_far(
    honest: Any, self: TokenContext, positions: Sequence[int], device: Any, ahead: Any, first: int
) -> None:
    honest(self, positions, device, ahead, first - 1)


BUGS: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "positions are off by one": [(TokenContext, "__init__", rotated_too_far)],
    "keys of the previous chunk are kept": [
        (KeyValueCache, "extend", lambda honest, self, layer, chunk, k, v: honest(self, layer, None, k, v)),
        (TokenContext, "plan", lambda honest, self, chunk: honest(self, None)),
    ],
    "slots that are not filled yet are seen": [
        (TokenContext, "_make_plan", lambda honest, self, chunk: AttentionPlan(causal=False))
    ],
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_broken_cache_is_noticed(bug, monkeypatch):
    for owner, name, function in BUGS[bug]:
        monkeypatch.setattr(owner, name, bound(function, getattr(owner, name)))
    assert largest_difference(LLAMA4) > 1e-3


@torch.no_grad()
def test_sequences_can_be_dropped():
    model, rows, kept = build(LLAMA4, seed=1), texts((6, 6, 6)), [2, 0]
    store = KeyValueCache()
    model(torch.stack(rows)[:, :6], store.prompts([6] * 3))
    for step in range(NEW):
        if step == 2:
            store.keep(kept)
            rows = [rows[index] for index in kept]
        logits = model(torch.stack(rows)[:, 6 + step, None], store.next_token())[:, 0]
    whole = torch.stack([model(row[None])[0, -1] for row in rows])
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-10)
    assert not torch.allclose(logits, whole.flip(0)), "control: the sequences differ"


def difference_after_new_weights() -> float:
    """Return the largest difference from a fresh cache's logits, for a cache used before the weights changed."""
    model, prompt_BT, used = build(LLAMA4, seed=1), torch.stack(texts((6,)))[:, :6], KeyValueCache()
    found = []
    with torch.no_grad():
        for store in (used, used, KeyValueCache()):
            model(prompt_BT, store.prompts([6]))
            found.append(model(prompt_BT[:, :1], store.next_token()))
            if len(found) == 1:
                for weight in model.parameters():
                    weight.mul_(1.5).add_(0.1)
    assert not torch.allclose(found[0], found[2]), "control: the weights matter"
    return float((found[1] - found[2]).abs().max())


def test_new_prompts_forget_the_joined_matrices(monkeypatch):
    """Joined queries, keys and values are copies, which a step of the optimizer between two prompts makes stale."""
    assert difference_after_new_weights() == 0

    def stale(honest: Any, self: KeyValueCache, *arguments: Any) -> Any:
        joined = self._joined
        context = honest(self, *arguments)
        self._joined = joined
        return context

    monkeypatch.setattr(KeyValueCache, "prompts", bound(stale, KeyValueCache.prompts))
    assert difference_after_new_weights() > 1e-3, "control: matrices that are kept"


@torch.inference_mode()
def operations_per_token(lengths: Sequence[int], joins: bool = True) -> float:
    """Return how many operations torch dispatches for a token of each sequence, after the first one."""
    model, store, seen = build(LLAMA4, seed=1), KeyValueCache(joins), []
    model(torch.zeros(len(lengths), max(lengths), dtype=torch.int64), store.prompts(lengths))
    tokens_B1 = torch.zeros(len(lengths), 1, dtype=torch.int64)
    model(tokens_B1, store.next_token())
    with Observed(lambda function, *_: seen.append(function)):
        for _ in range(NEW):
            model(tokens_B1, store.next_token())
    return len(seen) / NEW


MOST_OPERATIONS = {(7,): 196, (4, 4): 222, (3, 11, 5, 1): 250}
"""For four layers, two with experts. Measured: 192, 218 and 246. With each position's rotary factors computed at its
step, three products for queries, keys and values, and one token sorted by expert like many: 268, 268 and 282.
"""


@pytest.mark.parametrize("lengths", MOST_OPERATIONS)
def test_operations_of_a_token_are_few(lengths, monkeypatch):
    """Their number decides the speed of a small batch: a kernel launch each on a GPU, microseconds each on a CPU."""
    most = MOST_OPERATIONS[lengths]
    assert operations_per_token(lengths) <= most
    assert operations_per_token(lengths, joins=False) > most, "control: three products instead of one"
    monkeypatch.setattr(cache, "_AHEAD", 1)
    assert operations_per_token(lengths) > most, "control: rotary factors for each token"


def test_few_slots_are_sorted_on_the_host_alike():
    experts_TK = torch.randint(0, 5, (9, 2), generator=torch.Generator().manual_seed(0))
    ours, wanted = permute_on_host(experts_TK, 6), permute_by_expert(experts_TK, 6)
    assert torch.equal(ours.source_C, wanted.source_C) and torch.equal(ours.place_TK, wanted.place_TK)
    assert ours.groups.known == wanted.groups.host == ours.groups.counts_E.tolist() and ours.groups.host[5] == 0
    other = permute_on_host(experts_TK.flip(0), 6)
    assert not torch.equal(other.place_TK, wanted.place_TK), "control"


@pytest.mark.parametrize("weights_on", WeightsOn)
@pytest.mark.parametrize("chosen", [[3], [4, 0, 2]])
def test_one_token_is_dispatched_alike(chosen, weights_on):
    """Experts that were not chosen in the order of their numbers get their own weights."""
    generator = torch.Generator().manual_seed(0)
    x_1D, weights_1K = (torch.rand(1, n, generator=generator) for n in (6, len(chosen)))
    factor_E1 = torch.arange(1.0, 6.0)[:, None]
    routing, dispatcher = TopKRouting(torch.tensor([chosen]), weights_1K), LocalDispatcher(5, weights_on)
    found = []
    for context in (torch.no_grad(), torch.enable_grad()):  # gradients need the general way
        with context:
            sent = dispatcher(x_1D, routing)()
            expert_C = torch.repeat_interleave(torch.arange(5), sent.groups.counts_E)
            found.append(sent.combine(sent.x_CD * factor_E1[expert_C])()())
            assert sent.groups.host == [int(expert in chosen) for expert in range(5)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], x_1D * weights_1K.sum()), "control: the experts matter"
