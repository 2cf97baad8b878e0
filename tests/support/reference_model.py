"""A plain statement of the model's mathematics, token by token, to hold the fast code against.

Loops over rows, positions, heads and experts; float64; shares nothing with the package but the weights by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import FeedForward, ModelConfig, QKNorm, Score, WeightsOn


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def turn(vector: Tensor, position: int, theta: float) -> Tensor:
    out = vector.clone()
    for j in range(0, len(vector), 2):
        angle = position * theta ** (-j / len(vector))
        c, s = math.cos(angle), math.sin(angle)
        out[j], out[j + 1] = vector[j] * c - vector[j + 1] * s, vector[j] * s + vector[j + 1] * c
    return out


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    u = gate @ x
    return down @ (u * torch.sigmoid(u) * (up @ x))


def attention(x: Tensor, positions: list[int], model: ModelConfig, index: int, w: dict[str, Tensor]) -> Tensor:
    layer, name = model.blocks[index], f"layers.{index}.attention"
    length, group = len(x), model.num_heads // model.num_kv_heads
    document, current = [], -1
    for p in positions:
        current += p == 0
        document.append(current)
    out = []
    q, k, v = (
        (x @ w[f"{name}.{part}.weight"].T).view(length, -1, model.head_dim) for part in ("query", "key", "value")
    )

    def prepared(vector: Tensor, t: int) -> Tensor:
        if layer.rope:
            vector = turn(vector, positions[t], model.rope_theta)
        return rms(vector, model.norm_eps) if layer.qk_norm is QKNorm.weightless else vector

    for t in range(length):
        heads = []
        for h in range(model.num_heads):
            query = prepared(q[t, h], t)
            if layer.temperature:
                steps = math.floor((positions[t] + 1) / model.temperature_floor)
                query = query * (1 + model.temperature_scale * math.log(1 + steps))
            seen = [
                s
                for s in range(t + 1)
                if document[s] == document[t]
                and (
                    layer.attention_chunk_size is None
                    or positions[s] // layer.attention_chunk_size == positions[t] // layer.attention_chunk_size
                )
            ]
            scores = torch.stack([query @ prepared(k[s, h // group], s) for s in seen]) / math.sqrt(model.head_dim)
            weights = scores.softmax(0)
            heads.append(sum(weights[i] * v[s, h // group] for i, s in enumerate(seen)))
        out.append(w[f"{name}.output.weight"] @ torch.cat(heads))
    return torch.stack(out)


def feed_forward(x: Tensor, model: ModelConfig, index: int, w: dict[str, Tensor]) -> Tensor:
    name = f"layers.{index}.ffn"
    if model.blocks[index].feed_forward is FeedForward.dense:
        parts = [w[f"{name}.{p}.weight"] for p in ("gate", "up", "down")]
        return torch.stack([mlp(t, *parts) for t in x])
    rows = []
    for token in x:
        logits = w[f"{name}.router.weight"] @ token
        scores = torch.sigmoid(logits) if model.router.score is Score.sigmoid else logits.softmax(0)
        ranking = scores + w[f"{name}.router.balance.bias_E"] if model.balance.bias_rate else logits
        chosen = ranking.topk(model.router.top_k).indices.tolist()
        total = sum(scores[e] for e in chosen) if model.router.norm_topk_prob else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            parts = [*w[f"{name}.experts.gate_up.weight"][e], w[f"{name}.experts.down.weight"][e]]
            weight = scores[e] / total * model.router.scale
            y = y + (
                mlp(weight * token, *parts)
                if model.router.weights_on is WeightsOn.input
                else weight * mlp(token, *parts)
            )
        if model.shared_hidden_size:
            y = y + mlp(token, *(w[f"{name}.shared.{p}.weight"] for p in ("gate", "up", "down")))
        rows.append(y)
    return torch.stack(rows)


def logits(tokens: Tensor, positions: Tensor, model: ModelConfig, w: dict[str, Tensor]) -> Tensor:
    """Logits [T, V] of one row."""
    x = w["embedding.weight"][tokens]
    for i in range(model.num_layers):
        normed = rms(x, model.norm_eps) * w[f"layers.{i}.attention_norm.weight"]
        x = x + attention(normed, positions.tolist(), model, i, w)
        x = x + feed_forward(rms(x, model.norm_eps) * w[f"layers.{i}.ffn_norm.weight"], model, i, w)
    return (rms(x, model.norm_eps) * w["final_norm.weight"]) @ w["head.weight"].T
