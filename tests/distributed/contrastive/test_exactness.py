"""Contrastive losses and gradients are the same over ranks and micro-batches, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError
from launch.rank_pool import Pool
from model.config import ModelConfig
from model.transformer import Transformer
from model.vision.config import VisionConfig
from model.vision.towers import LARGEST_LOG_SCALE, ContrastiveTowers
from parallel.comm import collectives
from parallel.layout import ParallelConfig
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from tests.support.models import meshes_here, small
from train.contrastive import loss as losses
from train.contrastive.config import ContrastiveLoss
from train.contrastive.grad_cache import backward_in_parts
from train.contrastive.loss import contrastive_loss

PAIRS, TOKENS, FEATURES = 8, 6, 16
VISION = VisionConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_hidden_size=32,
    adapter_hidden_size=24,
    tile_size=16,
    patch_size=4,
    image_token_id=63,
)
Pairs = tuple[Tensor, Tensor, Tensor]
"""Tiles, tokens and the index of each caption's last token."""


def dense(**changes: Any) -> ModelConfig:
    return small(num_layers=2, moe_every=0, vision=VISION, **changes)


def towers(kind: ContrastiveLoss) -> ContrastiveTowers:
    precision, first = resolve(PrecisionConfig(Compute.float64)), kind.first
    made = ContrastiveTowers(dense(), FEATURES, precision, first.log_scale, first.bias).double()
    made.initialise(seed=3)
    return made


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(PAIRS, 3, VISION.tile_size, VISION.tile_size, dtype=torch.float64, generator=generator) * 2 - 1
    tokens = torch.randint(64, (PAIRS, TOKENS), generator=generator)
    return tiles, tokens, torch.randint(1, TOKENS, (PAIRS,), generator=generator)


def step(kind: ContrastiveLoss, parts: int, bug: str | None = None) -> dict[str, Tensor]:
    """Return the loss, gradients and weights after a step of SGD, from this rank's share of the pairs."""
    axis = meshes_here(ParallelConfig()).dp
    model = towers(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def encode(pairs: Pairs) -> tuple[Tensor, Tensor]:
        return model.image_features(pairs[0]), model.text_features(*pairs[1:])

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        return contrastive_loss(kind, images, texts, model.log_scale, model.bias, axis)

    share = PAIRS // axis.size
    local = [side[axis.rank * share :][:share] for side in pairs()]
    micro_batches = list(zip(*(side.chunk(parts) for side in local), strict=True))
    try:
        if bug == "no gradient through the gathered features":
            losses.all_gather = without_gradient
        if bug == "each micro-batch by itself":
            value = sum(backward_in_parts([one], encode, lambda *both: loss(*both) / parts) for one in micro_batches)
        else:
            value = backward_in_parts(micro_batches, encode, loss)
    finally:
        losses.all_gather = collectives.all_gather
    found = {"loss": value}
    for name, parameter in model.named_parameters():
        found[f"gradient of {name}"] = parameter.grad
    if axis.size > 1 and bug != "gradients of this rank only":
        for tensor in found.values():
            dist.all_reduce(tensor)
    optimizer.step()
    return found | {f"weight {name}": parameter.detach() for name, parameter in model.named_parameters()}


def without_gradient(shard: Tensor, *arguments: Any) -> Tensor:
    """Gather features as constants. Those of this rank have a gradient in its own rows only."""
    return collectives.all_gather_no_grad(shard.detach(), *arguments) + 0 * shard.sum()


def steps(parts: int, bug: str | None = None) -> dict[ContrastiveLoss, dict[str, Tensor]]:
    return {kind: step(kind, parts, bug) for kind in ContrastiveLoss}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of two results, relative to the largest value of its tensor, and where it is."""
    assert one.keys() == other.keys()
    return max((float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp_min(1e-30)), n) for n in one)


@pytest.fixture(scope="module")
def alone(ranks: Pool) -> dict[ContrastiveLoss, dict[str, Tensor]]:
    return ranks(1, steps, 1)[0]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "count, parts",
    [(1, 4), (2, 1), (4, 2), *(pytest.param(*case, marks=SLOW) for case in ((2, 4), (4, 1), (8, 1)))],
)
def test_ranks_and_micro_batches_change_nothing(ranks, alone, count, parts):
    for found in ranks(count, steps, parts):
        for kind in ContrastiveLoss:
            difference, where = farthest(alone[kind], found[kind])
            assert difference < 1e-9, (kind, where)


@pytest.mark.parametrize(
    "bug, count, parts",
    [
        ("no gradient through the gathered features", 2, 1),
        ("each micro-batch by itself", 1, 4),
        pytest.param("no gradient through the gathered features", 4, 2, marks=SLOW),
        pytest.param("gradients of this rank only", 2, 1, marks=SLOW),
    ],
)
def test_a_planted_bug_shows_in_the_gradients(ranks, alone, bug, count, parts):
    found = ranks(count, steps, parts, bug)[0]
    for kind in ContrastiveLoss:
        gradients = {name: found[kind][name] for name in found[kind] if name.startswith("gradient of")}
        assert farthest({name: alone[kind][name] for name in gradients}, gradients)[0] > 1e-3
        if bug.startswith("no gradient"):
            assert abs(found[kind]["loss"] - alone[kind]["loss"]) < 1e-9  # nothing in the loss tells


def plain_loss(kind: ContrastiveLoss, images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """State the losses pair by pair."""
    logits, total, count = log_scale.exp() * images @ texts.T, torch.zeros(()), len(images)
    for row in range(count):
        for column in range(count):
            match kind:
                case ContrastiveLoss.info_nce if row == column:
                    own = logits[row, row]
                    total = total - (own - logits[row].logsumexp(0)) / 2 - (own - logits[:, row].logsumexp(0)) / 2
                case ContrastiveLoss.siglip:
                    sign = 1 if row == column else -1
                    total = total + torch.log1p((-sign * (logits[row, column] + bias)).exp())
    return total / count


@pytest.mark.parametrize("kind", ContrastiveLoss)
def test_the_losses_are_their_plain_statements(kind):
    generator = torch.Generator().manual_seed(1)
    images, texts = (F.normalize(torch.randn(5, 7, dtype=torch.float64, generator=generator), dim=1) for _ in range(2))
    log_scale, bias = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64)
    axis = meshes_here(ParallelConfig()).dp
    found = contrastive_loss(kind, images, texts, log_scale, bias, axis)
    assert torch.isclose(found, plain_loss(kind, images, texts, log_scale, bias), rtol=1e-12)
    assert not torch.isclose(found, plain_loss(kind, images, texts.roll(1, 0), log_scale, bias), rtol=1e-3)


def test_padding_after_a_caption_is_not_seen():
    model, (_, tokens, last) = towers(ContrastiveLoss.info_nce), pairs()
    padded = torch.where(torch.arange(TOKENS) > last[:, None], 0, tokens)
    assert not torch.equal(padded, tokens)
    one, other = model.text_features(tokens, last), model.text_features(padded, last)
    assert torch.allclose(one, other, rtol=1e-12, atol=0)
    assert torch.allclose(one.norm(dim=1), torch.ones(PAIRS, dtype=torch.float64))
    assert not torch.allclose(one, model.text_features(tokens, last - 1), rtol=1e-3)


def test_the_encoder_has_the_names_and_shapes_of_a_decoders():
    """So its weights can start an early-fusion model, all but the projector's, which leads to another width."""
    decoder = Transformer(dense(), resolve(PrecisionConfig())).vision
    assert decoder is not None
    one, other = (
        {n: p.shape for n, p in tower.named_parameters()}
        for tower in (towers(ContrastiveLoss.info_nce).vision, decoder)
    )
    assert {name for name in one | other if one.get(name) != other.get(name)} == {"projector.weight"}


def test_the_scale_is_limited():
    model = towers(ContrastiveLoss.info_nce)
    model.log_scale.data.fill_(5.0)
    model.limit_scale()
    assert model.log_scale.item() == pytest.approx(LARGEST_LOG_SCALE)


def test_other_models_are_refused():
    precision = resolve(PrecisionConfig())
    with pytest.raises(ConfigError, match="dense layers only"):
        ContrastiveTowers(small(vision=VISION), FEATURES, precision, 0.0)
    with pytest.raises(ConfigError, match="needs a vision encoder"):
        ContrastiveTowers(small(moe_every=0), FEATURES, precision, 0.0)
