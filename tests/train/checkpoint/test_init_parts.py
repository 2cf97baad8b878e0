"""Test `model.init_parts`: the encoder and the decoder of a new run come from other models, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from model.config import InitPartsConfig, ModelConfig
from model.init import initial_slice
from model.roles import Role
from model.tensor_source import TensorSource, parameter_infos, whole
from model.vision.towers import ContrastiveTowers
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from tests.support import hf_models
from tests.support.mixed import write_documents
from tests.support.tiny import EXACT, config, saved, trainer
from tests.train.vision.test_vision_run import VISION, data_of
from train.checkpoint import init_from
from train.checkpoint.init_from import initial_source, open_model
from train.config import check
from train.trainer import Trainer

PROJECTOR = "vision.projector.weight"
Start = Callable[..., Trainer]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_corpus) -> Path:
    """Save a language model without pictures (`text`), and two with pictures: `wide` has a wider decoder."""
    root = tmp_path_factory.mktemp("runs")
    write_documents(root / "in")
    pictures = [*EXACT, *VISION, *data_of(root)]
    saved(root, "text", [*EXACT, *small_corpus, "run.seed=1"])
    saved(root, "seeing", [*pictures, "run.seed=2"])
    saved(root, "wide", [*pictures, "run.seed=3", "model.hidden_size=48"])
    return root


@pytest.fixture
def start(runs) -> Start:
    def begin(name: str, *overrides: str) -> Trainer:
        shutil.rmtree(runs / name, ignore_errors=True)
        return trainer(runs, name, [*EXACT, *VISION, *data_of(runs), *overrides])

    return begin


def from_runs(root: Path, **parts: str) -> list[str]:
    return [f"model.init_parts.{part}={root / name}" for part, name in parts.items()]


def origins(run: Trainer, sources: dict[str, TensorSource]) -> dict[str, set[str]]:
    """Return for each parameter which of the sources, or `new` for a new model's initial weights, it is equal to."""
    model, found = run.config.model, {}
    for name, parameter in run.engine.placed.model.named_parameters():
        info = run.engine.placed.specs[name].info
        new = initial_slice(info, model, run.config.run.seed, [0] * parameter.dim(), info.shape, torch.device("cpu"))
        read = {"new": new} | {key: whole(one, name) for key, one in sources.items() if name in one.shapes}
        value = parameter.detach()
        found[name] = {
            key for key, one in read.items() if one.shape == value.shape and torch.equal(one.double(), value)
        }
    return found


@pytest.mark.parametrize(
    "parts, vision, decoder",
    [
        ({"vision": "seeing", "decoder": "text"}, "seeing", "text"),
        ({"vision": "seeing"}, "seeing", "new"),
        ({"decoder": "seeing"}, "new", "seeing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_each_part_comes_from_its_model(runs, start, parts, vision, decoder):
    run = start("both", *from_runs(runs, **parts))
    found = origins(run, {name: open_model(runs / name) for name in ("text", "seeing")})
    for name, sources in found.items():
        expected = vision if name.startswith("vision.") else decoder
        # biases and gains of a router or norm may be equal in all models
        assert expected in sources and (len(sources) == 1 or not run.engine.placed.specs[name].info.role.is_matrix), (
            name
        )
    said = (runs / "both" / "log.txt").read_text()
    assert ("trained with another tokenizer" in said) == (decoder == "text")
    assert ("initial weights: " in said) == (decoder != "new"), "an encoder has no vocabulary"
    kept = {n: b for n, b in run.engine.placed.model.named_buffers() if n.endswith("bias_E")}
    assert all(bool(bias_E.any()) == (decoder != "new") for bias_E in kept.values()) and kept


def test_a_projector_to_another_width_starts_as_in_a_new_model(runs, start):
    run = start("narrow", *from_runs(runs, vision="wide"))
    found = origins(run, {"wide": open_model(runs / "wide")})
    assert found[PROJECTOR] == {"new"}
    assert all("wide" in found[name] for name in found if name.startswith("vision.") and name != PROJECTOR)
    assert f"{PROJECTOR} [32, 16] starts as in a new model" in (runs / "narrow" / "log.txt").read_text()
    with pytest.raises(ConfigError, match=r"init_parts\.vision.*no projector.*leave the projector out of training.fr"):
        start("frozen", *from_runs(runs, vision="wide"), "training.freeze=[vision]")
    blind = replace(run.config.model, vision=None)
    with pytest.raises(ConfigError, match="this model has no vision encoder"):
        initial_source(blind, 0, print)


def test_frozen_parts_keep_the_weights_of_their_models(runs, start):
    run = start("stage", *from_runs(runs, vision="wide", decoder="text"), "training.freeze=[decoder]")
    before = origins(run, {"text": open_model(runs / "text"), "wide": open_model(runs / "wide")})
    run.train_step(0)
    after = origins(run, {"text": open_model(runs / "text"), "wide": open_model(runs / "wide")})
    assert all("text" in after[name] for name in after if not name.startswith("vision."))
    moved = [name for name in after if name.startswith("vision.") and not after[name]]
    assert PROJECTOR in moved and all(before[name] for name in moved)


@pytest.mark.slow
def test_a_resumed_run_needs_no_source(runs, start):
    copies = runs / "copies"
    for name in ("seeing", "text"):
        shutil.copytree(runs / name, copies / name)
    line = [*from_runs(copies, vision="seeing", decoder="text"), "training.steps=4"]
    first = start("resumed", *line)
    first.train_step(0)
    first.save()
    first.checkpointer.wait()
    shutil.rmtree(copies)
    again = trainer(runs, "resumed", [*EXACT, *VISION, *data_of(runs), *line])
    assert again.step == 1
    pairs = zip(first.engine.placed.model.parameters(), again.engine.placed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ConfigError, match=r"model\.init_parts\.(vision|decoder).*no such directory"):
        start("new", *line)


class Towers:
    """Contrastive towers as a source of tensors."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.model = ContrastiveTowers(replace(config, moe_every=0), 32, resolve(PrecisionConfig(Compute.float32)), 1.0)
        self.model.initialise(seed=7)
        self.tensors = {name: value.detach() for name, value in self.model.named_parameters()}
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        self.dtypes = {name: value.dtype for name, value in self.tensors.items()}

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        return self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def test_the_encoder_of_contrastive_towers(runs, start, monkeypatch):
    """Its projector leads to features: it is not read, though it has the shape of one to the decoder."""
    towers = Towers(open_model(runs / "seeing").config)
    monkeypatch.setattr(init_from, "open_model", lambda path: towers)
    found = origins(start("from_towers", "model.init_parts.vision=towers"), {"towers": towers})
    assert towers.shapes[PROJECTOR] == (32, 16) and found[PROJECTOR] == {"new"}
    assert all("towers" in found[name] for name in found if name.startswith("vision.") and name != PROJECTOR)
    assert all(found[name] == {"new"} for name in found if not name.startswith("vision."))
    with pytest.raises(ConfigError, match=r"init_parts\.decoder=towers: has no decoder"):
        start("decoder", "model.init_parts.decoder=towers")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["decoder=text", "model.expert_hidden_size=64"],
            r"init_parts\.decoder.*model\.expert_hidden_size=32 there, 64",
        ),
        (
            ["vision=seeing", "model.vision.num_layers=3"],
            r"init_parts\.vision.*model\.vision\.num_layers=2 there, 3 her",
        ),
        (["vision=text"], r"init_parts\.vision.*has no vision encoder"),
        (["vision=seeing", "model.init_from=x"], "init_from gives the weights of all parts"),
    ],
)
def test_what_does_not_fit_is_refused(runs, overrides, message):
    given = [f"model.init_parts.{one.replace('=', f'={runs}/')}" if "." not in one else one for one in overrides]
    with pytest.raises(ConfigError, match=message):
        initial_source(config(runs, "refused", *VISION, *given).model, 0, print)


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_a_frozen_part_needs_weights(runs, part):
    line = [*VISION, *data_of(runs), f"training.freeze=[{part}]"]
    with pytest.raises(ConfigError, match=rf"training.freeze=\[{part}\].*random weights.*model.init_parts.{part}"):
        check(config(runs, "refused", *line), 1)
    check(config(runs, "refused", *line, *from_runs(runs, **{part: "seeing"})), 1)


@pytest.mark.slow
def test_parts_of_a_hugging_face_model(tmp_path):
    """Its decoder and its encoder go into a model with another encoder, or with another decoder."""
    source = hf_models.save(hf_models.make_with_vision(), tmp_path / "hf")
    model = open_model(source).config
    parts = InitPartsConfig(vision=str(source))
    other: ModelConfig = replace(model, hidden_size=32, init_parts=parts)
    taken = initial_source(other, 0, print)
    infos = parameter_infos(other)
    assert set(taken.shapes) == {n for n, i in infos.items() if i.role.is_vision and i.role is not Role.projector}
    parts = InitPartsConfig(decoder=str(source))
    taken = initial_source(replace(model, vision=None, init_parts=parts), 0, print)
    assert taken.shapes == {n: s for n, s in open_model(source).shapes.items() if not n.startswith("vision.")}
    assert torch.equal(whole(taken, "head.weight"), whole(open_model(source), "head.weight"))
