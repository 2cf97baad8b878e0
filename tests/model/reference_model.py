"""A plain implementation of the model's mathematics, token by token, as a reference for the fast code.

It loops over positions, heads and experts in float64. It shares only the names of the weights with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import FeedForward, ModelConfig, QKNorm, Score, WeightsOn


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def turn(vector: Tensor, position: int, theta: float) -> Tensor:
    out: list[Tensor] = []
    for j in range(0, len(vector), 2):
        angle = position * theta ** (-j / len(vector))
        c, s = math.cos(angle), math.sin(angle)
        out += [vector[j] * c - vector[j + 1] * s, vector[j] * s + vector[j + 1] * c]
    return torch.stack(out)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    u = gate @ x
    return down @ (u * torch.sigmoid(u) * (up @ x))


def attention(x: Tensor, positions: list[int], model: ModelConfig, index: int, w: dict[str, Tensor]) -> Tensor:
    layer, name = model.blocks[index], f"layers.{index}.attention"
    group, chunk = model.num_heads // model.num_kv_heads, layer.attention_chunk_size
    document, current = [], -1
    for p in positions:
        current += p == 0
        document.append(current)

    def projected(part: str) -> Tensor:
        return (x @ w[f"{name}.{part}.weight"].T).view(len(x), -1, model.head_dim)

    def prepared(vector: Tensor, t: int) -> Tensor:
        if layer.rope:
            vector = turn(vector, positions[t], model.rope_theta)
        return rms(vector, model.norm_eps) if layer.qk_norm is QKNorm.weightless else vector

    if model.latent is None:
        keys = [[prepared(head, t) for head in heads] for t, heads in enumerate(projected("key"))]
        values, all_queries = projected("value"), projected("query")
    else:
        keys, values, all_queries = latent_heads(x, positions, model, name, w)
    out = []
    for t, queries in enumerate(all_queries):
        seen = [s for s in range(t + 1) if document[s] == document[t]]
        seen = [s for s in seen if chunk is None or positions[s] // chunk == positions[t] // chunk]
        heads = []
        for h, vector in enumerate(queries):
            query = prepared(vector, t) if model.latent is None else vector
            if layer.temperature:
                steps = math.floor((positions[t] + 1) / model.temperature_floor)
                query = query * (1 + model.temperature_scale * math.log(1 + steps))
            scores = torch.stack([query @ keys[s][h // group] for s in seen]) / math.sqrt(model.head_dim)
            weights = scores.softmax(0)
            heads.append(sum(weights[i] * values[s][h // group] for i, s in enumerate(seen)))
        out.append(w[f"{name}.output.weight"] @ torch.cat(heads))
    return torch.stack(out)


def latent_heads(
    x: Tensor, positions: list[int], model: ModelConfig, name: str, w: dict[str, Tensor]
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[list[Tensor]]]:
    """Return the keys, values and queries of each token and head in latent attention."""
    latent = model.latent
    assert latent is not None
    still = model.head_dim - latent.rope_dim

    def of(part: str, vector: Tensor) -> Tensor:
        return w[f"{name}.{part}.weight"] @ vector

    def normed(part: str, vector: Tensor) -> Tensor:
        return rms(vector, 1e-6) * w[f"{name}.{part}.weight"]

    keys, values, queries = [], [], []
    for token, position in zip(x, positions, strict=True):
        down = of("latent_down", token)
        shared = turn(down[latent.kv_rank :], position, model.rope_theta)
        up = of("latent_up", normed("latent_norm", down[: latent.kv_rank])).view(model.num_heads, -1)
        keys.append([torch.cat([head[:still], shared]) for head in up])
        values.append([head[still:] for head in up])
        heads = of("query_up", normed("query_norm", of("query_down", token))).view(model.num_heads, -1)
        queries.append([torch.cat([h[:still], turn(h[still:], position, model.rope_theta)]) for h in heads])
    return keys, values, queries


def feed_forward(x: Tensor, model: ModelConfig, index: int, w: dict[str, Tensor]) -> Tensor:
    name, router = f"layers.{index}.ffn", model.router
    if model.blocks[index].feed_forward is FeedForward.dense:
        parts = [w[f"{name}.{p}.weight"] for p in ("gate", "up", "down")]
        return torch.stack([mlp(t, *parts) for t in x])
    rows = []
    for token in x:
        logits = w[f"{name}.router.weight"] @ token
        scores = torch.sigmoid(logits) if router.score is Score.sigmoid else logits.softmax(0)
        is_biased = model.balance.bias_rate or router.selection_bias
        ranking = scores + w[f"{name}.router.balance.bias_E"] if is_biased else logits
        if router.groups > 1:
            ranking = ranking if is_biased else scores
            grouped = ranking.view(router.groups, -1)
            best = sorted(
                range(router.groups), key=lambda g: -float(grouped[g].detach().sort(descending=True).values[:2].sum())
            )
            outside = [g not in best[: router.top_groups] for g in range(router.groups)]
            ranking = grouped.masked_fill(torch.tensor(outside)[:, None], -math.inf).flatten()
        chosen = ranking.topk(router.top_k).indices.tolist()
        total = sum(scores[e] for e in chosen) if router.norm_topk_prob else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            parts = [*w[f"{name}.experts.gate_up.weight"][e], w[f"{name}.experts.down.weight"][e]]
            weight = scores[e] / total * router.scale
            scales_input = router.weights_on is WeightsOn.input
            y = y + (mlp(weight * token, *parts) if scales_input else weight * mlp(token, *parts))
        if model.shared_hidden_size:
            y = y + mlp(token, *(w[f"{name}.shared.{p}.weight"] for p in ("gate", "up", "down")))
        rows.append(y)
    return torch.stack(rows)


def logits(tokens: Tensor, positions: Tensor, model: ModelConfig, w: dict[str, Tensor]) -> Tensor:
    """Return the logits [T, V] of one sequence."""
    x = w["embedding.weight"][tokens]
    for i in range(model.num_layers):
        normed = rms(x, model.norm_eps) * w[f"layers.{i}.attention_norm.weight"]
        x = x + attention(normed, positions.tolist(), model, i, w)
        x = x + feed_forward(rms(x, model.norm_eps) * w[f"layers.{i}.ffn_norm.weight"], model, i, w)
    return (rms(x, model.norm_eps) * w["final_norm.weight"]) @ w["head.weight"].T
