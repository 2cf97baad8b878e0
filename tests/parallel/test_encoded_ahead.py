"""Encoding a step's tiles ahead gives the rows and gradients of encoding each micro-batch when it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.init import initialise
from model.vision.encoder import VisionEncoder
from model.vision.fusion import EncodedImages, Images, place
from parallel.vision.ahead import EncodedStep
from tests.support.models import build, small
from tests.train.test_freeze import VISION

TILES, MICRO_BATCHES, LENGTH = 5, 3, 24


def encoder() -> VisionEncoder:
    config = small(vision=VISION)
    model = build(config)
    initialise(model, config, 0)
    assert model.vision is not None
    return model.vision


def images() -> Images:
    """Return 3 tiles in the first sequence, none in the second and 2 in the third."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(TILES, 3, 8, 8, generator=generator, dtype=torch.float64)
    rows_BT = torch.full((MICRO_BATCHES, LENGTH), -1)
    rows_BT[0, 2:14] = torch.arange(12)
    rows_BT[2, 10:18] = torch.arange(12, 20)
    return Images(pixels, rows_BT)


def losses(shown: Images, encoder: VisionEncoder | None) -> Tensor:
    """Return a loss of each micro-batch that weighs every value differently."""
    text_BTD = torch.linspace(-1, 1, LENGTH * 32, dtype=torch.float64).view(1, LENGTH, 32)
    rows_MD = shown.rows_MD if isinstance(shown, EncodedImages) else shown.encode(encoder)
    return (place(text_BTD, rows_MD, shown.rows_BT).sin() * (1 + text_BTD)).square().sum()


def gradients(encoder: VisionEncoder) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


@pytest.mark.parametrize("backward", [True, False])
def test_rows_and_gradients_are_those_of_one_pass(backward):
    """Without the second phase the encoder has no gradient."""
    whole, ahead = encoder(), encoder()
    together = images()
    wanted = torch.stack([losses(Images(together.tiles_N3SS, rows_BT), whole) for rows_BT in together.rows_BT.split(1)])
    wanted.sum().backward()
    step = EncodedStep(ahead, together, MICRO_BATCHES, torch.device("cpu"))
    found = torch.stack([losses(shown, None) for shown in step.micro_batches()])
    assert torch.allclose(found, wanted, rtol=1e-12)
    found.sum().backward()
    assert all(gradient is None for gradient in gradients(ahead).values())
    if backward:
        step.backward()
        for name, gradient in gradients(whole).items():
            assert torch.allclose(gradients(ahead)[name], gradient, rtol=1e-9, atol=1e-15), name


def test_a_step_without_tiles_has_gradients_of_zero():
    """Ranks of other sequences wait for this one's part of the encoder's sums."""
    here = encoder()
    step = EncodedStep(here, None, MICRO_BATCHES, torch.device("cpu"))
    step.backward()
    assert all(gradient is not None and not gradient.any() for gradient in gradients(here).values())


@torch.no_grad()
def test_kept_rows_are_not_encoded_again(monkeypatch):
    here, calls = encoder(), []
    honest = VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, x: (calls.append(len(x)), honest(self, x))[1])
    kept: list[Tensor] = []
    shown = [replace(images(), kept=one) for one in (kept, kept, None)]
    steps = [EncodedStep(here, one, MICRO_BATCHES, torch.device("cpu")) for one in shown]
    assert calls == [2, 2, 1, 2, 2, 1], "the second step encodes nothing, the third has no list to keep rows in"
    rows = [[one.rows_MD for one in step.micro_batches()] for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(rows[0], rows[1], strict=True))
