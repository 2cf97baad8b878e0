"""Frozen roles keep their weights to the bit, and no work is done for their gradients."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.config import load
from core.errors import ConfigError
from model.config import BalanceConfig, ModelConfig
from model.flops import training_flops, vision_flops
from model.roles import GROUPS, Role, check_freeze, roles_of
from model.tensor_source import parameter_infos
from model.vision.config import VisionConfig
from parallel.cost import static_bytes
from parallel.layout import ParallelConfig
from parallel.parallelize import ParallelModel, build
from parallel.vision.config import VisionParallelConfig
from precision.config import Compute, PrecisionConfig
from tests.support.models import meshes_here, small
from tests.support.tiny import TINY, config, saved, synthetic
from train.certify.plan import techniques
from train.certify.worker import SEQ_LEN
from train.config import TrainConfig, check
from train.optim.config import MuonConfig, OptimizerConfig, OptimizerKind
from train.run_directory import RunDirectory

FP64 = PrecisionConfig(Compute.float64)
VISION = VisionConfig(16, 2, 2, 24, 20, tile_size=8, patch_size=2, image_token_id=63)


def seeing(*freeze: str) -> ParallelModel:
    meshes = meshes_here(ParallelConfig())
    device = torch.device("cpu")
    balance = BalanceConfig(bias_rate=0.01, aux=0.01, z=0.001)
    return build(small(vision=VISION, balance=balance), FP64, meshes, device, 1, roles_of(freeze))


def weights(placed: ParallelModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in placed.model.named_parameters()}


@pytest.mark.parametrize(
    "freeze, kind",
    [
        ("vision", OptimizerKind.adamw),
        ("decoder", OptimizerKind.muon),
        *(pytest.param("router", kind, marks=pytest.mark.slow) for kind in (OptimizerKind.adamw, OptimizerKind.muon)),
    ],
)
def test_frozen_weights_stay_and_the_others_move(freeze, kind):
    placed = seeing(freeze)
    before = weights(placed)
    engine, _, step = synthetic(placed, OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.5, muon=MuonConfig()), 4)
    found = [step() for _ in range(2)]
    assert all(one.gradient_norm > 0 for one in found)
    frozen = {name for name, spec in placed.specs.items() if spec.info.role in roles_of([freeze])}
    after = weights(placed)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    held = {name for name, parameter in placed.model.named_parameters() if parameter in engine.optimizer.state}
    assert held == before.keys() - frozen
    assert not any(parameter.grad is not None for parameter in placed.model.parameters())
    kept = sum(value.nbytes for state in engine.optimizer.state.values() for value in state.values())
    model, muon, roles = placed.model.config, kind is OptimizerKind.muon, roles_of([freeze])
    formula = static_bytes(model, FP64, placed.meshes.layout, torch.float64, muon=muon, frozen=roles)
    trained = sum(8 * p.numel() for p in placed.model.parameters() if p.requires_grad)
    assert (formula.optimizer, formula.gradients) == (kept, trained)
    assert formula.parameters == sum(8 * p.numel() for p in placed.model.parameters())


def test_the_norm_has_trained_parameters_only():
    """The norm of everything is that of both halves together."""
    squares = []
    for freeze in ([], ["vision"], ["decoder"]):
        _, _, step = synthetic(seeing(*freeze), OptimizerConfig(kind=OptimizerKind.sgd), 4)
        squares.append(float(step().gradient_norm) ** 2)
    whole, decoder, encoder = squares
    assert whole == pytest.approx(decoder + encoder, rel=1e-12) and min(decoder, encoder) > 0


def test_a_frozen_router_keeps_its_selection_bias_and_is_counted():
    """Also where nothing before a router is trained, so that no gradient reaches it."""
    counts = {}
    for freeze in ("vision", "decoder", "head"):
        placed = seeing(*(name for name in Role.__members__ if name != "head") if freeze == "head" else [freeze])
        _, _, step = synthetic(placed, OptimizerConfig(kind=OptimizerKind.sgd), 4)
        counts[freeze] = step().balance
        moved = [bool(b.any()) for name, b in placed.model.named_buffers() if name.endswith("bias_E")]
        assert moved == [freeze == "vision"] * 2
    for key, values in counts["vision"].items():
        for other in ("decoder", "head"):
            assert torch.allclose(values, counts[other][key], rtol=1e-12), key


def test_no_backward_pass_runs_through_a_frozen_encoder():
    """Torch does not count attention on a CPU. It computes no gradient of pixels, which the formulas count."""
    free, (encoder, everything, kept) = work(), work("vision")
    assert kept == 0 < free[2]
    assert encoder == 6 * vision_flops(VISION, 32, roles_of(["vision"])).matrices
    assert free[0] == 6 * (vision_flops(VISION, 32).matrices - 2 * 16 * 12 * 16)
    assert free[1] - everything == free[0] - encoder


def work(*freeze: str) -> tuple[int, int, int]:
    """Return the FLOPs of the encoder and of the model in a step of 6 tiles, and the bytes that the encoder keeps."""
    placed, kept, hooks = seeing(*freeze), list[int](), ExitStack()
    _, _, step = synthetic(placed, OptimizerConfig(kind=OptimizerKind.sgd), 4)
    saving = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x)
    encoder = placed.model.vision
    encoder.register_forward_pre_hook(lambda *_: hooks.enter_context(saving))
    encoder.register_forward_hook(lambda *_: hooks.close())
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()
    encoded = max(sum(ops.values()) for name, ops in counts.items() if name.endswith(".vision"))
    return encoded, counter.get_total_flops(), sum(kept)


@pytest.mark.parametrize(
    "freeze",
    [pytest.param(["decoder"], marks=pytest.mark.slow), ["query", "expert_down", "head", "vision_up", "adapter_out"]],
)
def test_frozen_roles_need_fewer_flops(freeze):
    """Weight gradients are not computed. Gradients of hidden states are. The counter ignores attention here."""
    tokens, config = 8 * SEQ_LEN, small(vision=VISION)
    formula = [
        tokens * training_flops(config, SEQ_LEN, frozen).matrices + 6 * vision_flops(VISION, 32, frozen).matrices
        for frozen in (roles_of(freeze), frozenset())
    ]
    assert work()[1] - work(*freeze)[1] == formula[1] - formula[0] > 0


def there(model: ModelConfig) -> set[Role]:
    return {info.role for info in parameter_infos(model).values()}


def test_bad_names_are_refused_in_one_line():
    text, seeing = small(), small(vision=VISION)
    for freeze, model, reason in (
        (["quary"], None, r"freeze=quary: no such role or group of roles; try vision, encoder, decoder, embedding"),
        (["vision"], text, "freeze=vision: the model has no such parameters; try embedding"),
        (["decoder"], text, "leaves nothing to train"),
        (["vision", "decoder"], seeing, "leaves nothing to train"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_freeze(freeze, there(model) if model else None)
    for freeze in (["vision"], ["decoder"], []):
        check_freeze(freeze, there(seeing))
    with pytest.raises(ConfigError, match=r"^training\.freeze=vision: the model has no such parameters"):
        check(load("train", TrainConfig, [*TINY, "run.name=x", "training.freeze=[vision]"]), 1)
    logits = {Role.logit_scale, Role.logit_bias}
    assert GROUPS["vision"] | GROUPS["decoder"] | logits == set(Role) and not GROUPS["vision"] & GROUPS["decoder"]
    assert GROUPS["vision"] - GROUPS["encoder"] == {Role.projector} and not GROUPS["decoder"] & logits


@pytest.mark.slow
def test_a_run_resumes_with_the_same_frozen_roles_only(tmp_path: Path, small_corpus):
    freeze = [*small_corpus, "training.freeze=[embedding,router]"]
    first = saved(tmp_path, "run", freeze)
    again = saved(tmp_path, "run", freeze, steps=2)
    assert (first.step, again.step) == (1, 2)
    stored = {shard.name for shard in again.engine.state()}
    assert "model.embedding.weight" in stored and not any("optimizer.embedding" in name for name in stored)
    other = config(tmp_path, "run", *small_corpus, "training.freeze=[router]")
    with pytest.raises(ConfigError, match=r"training\.freeze.*was started with"):
        RunDirectory.of(other).check(other)


def test_a_certificate_names_frozen_roles_and_the_encoders_ranks():
    """Only where they are set: other certificates stay valid."""
    usual = techniques(ParallelConfig())
    assert not {"frozen", "vision"} & usual.keys()
    assert techniques(ParallelConfig(), freeze=["head", "query"]) == usual | {"frozen": ["head", "query"]}
    shared = VisionParallelConfig(over_data_parallel=True, image_token_share=0.3)
    assert techniques(ParallelConfig(vision=shared))["vision"]["over_data_parallel"] is True
    assert techniques(ParallelConfig(vision=VisionParallelConfig(image_token_share=0.3))) == usual
