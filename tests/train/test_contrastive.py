"""A contrastive run in one process: what is refused, which documents are pairs, its files, and who can read them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from core.config import load
from core.errors import ConfigError
from data.config import Packing
from data.corpus import HELD_OUT, TRAIN, prepare
from launch.verbs import certify
from model.config import InitPartsConfig
from model.init import initial_slice
from model.roles import GROUPS, Role, roles_of
from model.tensor_source import PartSources, whole
from parallel.comm.world import connect
from parallel.layout import EngineKind
from parallel.parallelize import build
from precision.config import Backend, PrecisionConfig
from tests.distributed.contrastive.pairs import NO_PAIRS, caption, overrides
from tests.support.tiny import config, trainer
from train.callbacks.retrieval import RetrievalCallback
from train.certify.config import CertifyConfig
from train.checkpoint import init_from
from train.checkpoint.init_from import initial_source, open_model
from train.checkpoint.restore import restore
from train.config import TrainConfig, TrainingConfig, check, run_parameters
from train.contrastive.config import ContrastiveConfig, ContrastiveLoss
from train.contrastive.engine import ContrastiveEngine, PairTokens, features, pair_batches
from train.contrastive.retrieval import Retrieval, held_out_retrieval
from train.contrastive.towers import num_parameters
from train.convert import export_checkpoint
from train.engine.images import batch_images
from train.engine.memory import check_memory
from train.engine.objective import pair_tokens
from train.report import retrieval
from train.trainer import Trainer
from train.trainer import run as run_training

ALL_BUT_ONE = sorted(role.name for role in GROUPS["encoder"] - {Role.vision_position})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contrastive")


@pytest.fixture(scope="module")
def finished(root: Path) -> Trainer:
    """A run of three steps with its summary and report."""
    words = ["training.steps=3", "evaluation.every=2", "logging.report=true", "training.contrastive.loss=siglip"]
    run = trainer(root, "run", [*overrides(root), *words, "optimizer.lr=0.01"])
    assert run.fit() == 0
    return run


@pytest.fixture(scope="module")
def legal(root: Path) -> TrainConfig:
    return load("train", TrainConfig, overrides(root))


def changed(config: Any, key: str, value: Any) -> Any:
    """Return the configuration with another value of one key."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.moe_every", 2, r"model\.moe_every=2: .* dense layers only; try 0"),
        ("data.packing", Packing.best_fit, r"data\.packing=best_fit: .*; try pairs"),
        ("data.images.tiles.max_tiles", 4, r"data\.images\.tiles\.max_tiles=4: .*; try 1"),
        ("training.seq_len", 9, r"training\.seq_len=9: a pair needs 9 tokens besides its caption's; try 20"),
        ("parallel.tp", 2, r"parallel\.tp=2: .* data parallelism \(dp_replicate, dp_shard\) only; try 1"),
        ("parallel.cp", 2, r"parallel\.cp=2: .*; try 1"),
        ("parallel.pp", 2, r"parallel\.pp=2: .*; try 1"),
        ("parallel.ep", 2, r"parallel\.ep=2: the model has no routed experts; try 1"),
        ("parallel.engine", EngineKind.deepspeed, r"parallel\.engine=deepspeed: is not supported .*; try fsdp2"),
        ("parallel.compile", True, r"parallel\.compile=true: is not supported by the contrastive .*; try false"),
        ("online.every", 2, r"online\.every=2: is not supported by the contrastive objective; try 0"),
        ("model.init_from", "there", r"model\.init_from=there: is not supported by the contrastive .*; try null"),
        ("precision", PrecisionConfig(backend=Backend.emulated), r"precision\.backend=emulated: is not .*; try native"),
        ("model.init_parts", InitPartsConfig(decoder="x"), r"model\.init_parts\.decoder=x: is not .*; try null"),
        ("training.global_batch_size", 1, r"training\.global_batch_size=1: .* one pair alone teaches nothing; try 2"),
        ("training.freeze", ["vision"], r"training\.freeze=\[vision\]: keeps random .*\(model\.init_parts\.vision\)"),
        ("training.freeze", ALL_BUT_ONE, r"training\.freeze=\[adapter_in,.*vision_value\]: keeps random weights"),
        ("training.freeze", ["decoder"], r"training\.freeze=\[decoder\]: keeps random .* takes no others: omit it"),
        ("training.freeze", ["logit_bias"], r"training\.freeze=logit_bias: the model has no such .* or logit_scale$"),
        ("training", TrainingConfig(), r"data\.packing=pairs: prepares training\.objective=contrastive; try"),
    ],
)
def test_what_cannot_work_is_refused_early(legal, key, value, message):
    check(legal, 2)
    with pytest.raises(ConfigError, match=message):
        check(changed(legal, key, value), 2)


def test_what_may_be_frozen(legal):
    """Matrices with the weights of another model, and everything else."""
    started = changed(legal, "model.init_parts", InitPartsConfig(vision="there"))
    for freeze in (["vision"], ["encoder"], ALL_BUT_ONE):
        check(changed(started, "training.freeze", freeze), 1)
    for freeze in (["vision_patch"], ["projector"], ["logit_scale"], ["embedding"]):
        check(changed(legal, "training.freeze", freeze), 1)
    sigmoid = changed(legal, "training.contrastive.loss", ContrastiveLoss.siglip)
    check(changed(sigmoid, "training.freeze", ["logit_bias"]), 1)
    micro = changed(changed(sigmoid, "training.micro_batch_size", 1), "training.global_batch_size", 1)
    check(micro, 1)


def test_settings_of_another_objective_are_refused():
    with pytest.raises(ConfigError, match=r"^contrastive: configures another objective: add training\.objective="):
        TrainingConfig(contrastive=ContrastiveConfig(feature_size=3))


def test_documents_that_are_no_pairs_are_left_out_and_counted(finished):
    splits, said = finished.corpus.manifest["sources"]["text"], list[str]()
    counts = sum((Counter(splits[split]["counts"]) for split in (TRAIN, HELD_OUT)), Counter())
    assert counts["documents"] == 40
    assert {key: n for key, n in counts.items() if key.startswith("dropped_")} == {
        f"dropped_{reason.replace(' ', '_')}": 1 for reason in NO_PAIRS
    }
    for split in (TRAIN, HELD_OUT):
        stream = finished.corpus.stream("text", split)
        assert stream.num_sequences(48) == splits[split]["counts"]["documents"]
        assert len(stream) == 48 * stream.num_sequences(48) + 1
    prepare(finished.config.data, said.append)
    for reason in NO_PAIRS:
        assert f"data.sources.text: 1 of its documents are no pairs and were dropped ({reason})" in said


def test_a_caption_is_what_is_left_of_a_pair(finished):
    batch, pictures = finished.loaders["main"].batch(0), finished.corpus.pictures("text", TRAIN)
    texts, last = finished.engine.ids.captions(batch.tokens_BT)
    assert texts.shape[1] == 48 - (finished.corpus.images.tiles.tokens_per_tile + 3)
    for row, end, [tile] in zip(texts, last.tolist(), batch.images.tiles, strict=True):
        number = int(Path(pictures.describe(tile.image).name).stem)
        assert finished.corpus.tokenizer.decode(row[1:end].tolist()) == caption(number)


def test_metrics_summary_and_report_show_retrieval(finished):
    folder = finished.directory.path
    lines = [json.loads(line) for line in finished.directory.metrics.read_text().splitlines()]
    measured = [line for line in lines if "retrieval" in line]
    assert [line["step"] for line in measured] == [2, 3]
    found, summary = measured[-1]["retrieval"], json.loads((folder / "summary.json").read_text())
    assert summary["retrieval"] == found and summary["heldout_loss"] == found["loss"]
    assert found["pairs"] == finished.config.evaluation.sequences < finished.loaders["main"].num_held_out("text")
    assert summary["total_parameters"] == sum(p.numel() for p in finished.engine.placed.model.parameters())
    assert summary["total_parameters"] == num_parameters(finished.config)
    assert summary["static_bytes"]["parameters"] == 4 * summary["total_parameters"]
    page = (folder / "report.html").read_text()
    assert "held-out loss, nats per pair" in page and "found first: captions of pictures" in page
    assert "Retrieval among held-out pairs" in page


def test_the_checkpoint_is_read_by_name(finished):
    source = open_model(finished.directory.path)
    for name, parameter in finished.engine.placed.model.named_parameters():
        assert torch.equal(whole(source, name), parameter), name
    assert "vision.projector.weight" in source.shapes and "embedding.weight" not in source.shapes


def test_the_encoder_starts_a_language_model(finished):
    parts = InitPartsConfig(vision=str(finished.directory.path))
    said = list[str]()
    source = initial_source(replace(finished.config.model, moe_every=2, init_parts=parts), 0, said.append)
    weights = dict(finished.engine.placed.model.named_parameters())
    names = {name for name in weights if name.startswith("vision.")} - {"vision.projector.weight"}
    assert isinstance(source, PartSources) and source.sources.keys() == names
    assert all(torch.equal(whole(source.sources[name], name), weights[name]) for name in names)
    assert any("vision.projector.weight" in line and "starts as in a new model" in line for line in said)


def test_verbs_that_need_a_language_model_refuse(finished, tmp_path):
    folder, message = (
        finished.directory.path,
        "has no language model: it is trained with training.objective=contrastive",
    )
    with pytest.raises(ConfigError, match=f"^run=.*{message}"):
        restore(folder, connect())
    with pytest.raises(ConfigError, match=f"^source=.*{message}"):
        export_checkpoint(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"^run=.*{message}"):
        certify.run(CertifyConfig(run=str(folder)))
    model = replace(finished.config.model, init_from=str(folder))
    with pytest.raises(ConfigError, match=r"^model\.init_from=.*: has no decoder: it is a contrastive run"):
        initial_source(model, 0, print)


def test_a_corpus_without_pairs_is_refused(finished, monkeypatch):
    pair_tokens(finished.corpus, finished.config)
    monkeypatch.setitem(finished.corpus.manifest, "packing", {"kind": "best_fit", "row_tokens": 48})
    with pytest.raises(ConfigError, match=r"data\.tokens: has no image-caption pairs: .*; try data\.packing=pairs"):
        pair_tokens(finished.corpus, finished.config)


def test_initial_values_are_those_of_the_network(finished):
    infos = run_parameters(finished.config)
    assert {info.role for info in infos.values() if info.role.is_logit} == {Role.logit_scale, Role.logit_bias}
    first = finished.config.training.contrastive.loss.first
    for name, value in (("log_scale", first.log_scale), ("bias", first.bias)):
        found = initial_slice(infos[name], finished.config.model, 0, [0], [1], torch.device("cpu"))
        assert found.tolist() == pytest.approx([value])


def test_the_scale_is_limited_after_each_step(finished):
    assert isinstance(finished.engine, ContrastiveEngine)
    towers = finished.engine.placed.model
    kept = towers.log_scale.item()
    finished.engine.forward_backward(finished.loaders["main"].batch(0), 4)
    with torch.no_grad():
        towers.log_scale.fill_(9.0)
    finished.engine.step(0.0)
    assert towers.log_scale.item() == pytest.approx(4.60517, abs=1e-5)
    nn.init.constant_(towers.log_scale, kept)


def test_captions_keep_what_is_no_picture():
    ids = PairTokens((2, 3, 5), eos=1)
    tokens = torch.tensor([[0, 2, 5, 3, 8, 9, 1, 1], [0, 7, 2, 5, 3, 1, 1, 1]])
    texts, last = ids.captions(tokens)
    assert texts.tolist() == [[0, 8, 9, 1, 1], [0, 7, 1, 1, 1]]
    assert last.tolist() == [3, 2]


def test_a_frozen_encoder_keeps_its_weights(root, finished):
    """Those of another run, with its projector to as many features."""
    started = [f"model.init_parts.vision={finished.directory.path}", "training.freeze=[vision]"]
    run = trainer(root, "frozen", [*overrides(root), *started])
    check(run.config, 1)
    for name, parameter in finished.engine.placed.model.vision.named_parameters():
        assert torch.equal(parameter, run.engine.placed.model.vision.get_parameter(name)), name
    before = {name: p.detach().clone() for name, p in run.engine.placed.model.named_parameters()}
    run.train_step(0)
    changed = {name for name, p in run.engine.placed.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith("vision.")}


def test_a_language_models_projector_leads_elsewhere(finished, monkeypatch):
    """So it is not read, though it has the same shape."""
    model = replace(finished.config.model, init_parts=InitPartsConfig(vision=str(finished.directory.path)))
    infos, projector = run_parameters(finished.config), "vision.projector.weight"
    towers = initial_source(model, 0, print, infos=infos)
    assert towers is not None and projector in towers.shapes
    language = open_model(finished.directory.path)
    language.shapes["embedding.weight"] = (264, 32)
    monkeypatch.setattr(init_from, "open_model", lambda path: language)
    taken = initial_source(model, 0, print, roles_of(["encoder"]), infos)
    assert taken is not None and towers.shapes.keys() - taken.shapes.keys() == {projector}
    with pytest.raises(
        ConfigError, match=r"no projector to this network's 12 columns.*; try training\.freeze=\[encoder"
    ):
        initial_source(model, 0, print, roles_of(["vision"]), infos)


def test_networks_are_compared_before_data_are_prepared(root, finished, monkeypatch):
    class Prepared(Exception):
        pass

    def prepared(*arguments: Any) -> None:
        raise Prepared

    monkeypatch.setattr("train.trainer.get_corpus", prepared)
    given = [*overrides(root), f"model.init_parts.vision={finished.directory.path}"]
    with pytest.raises(Prepared):
        run_training(config(root, "same", *given))
    other = config(root, "other", *given, "model.vision.num_layers=2")
    with pytest.raises(ConfigError, match=r"^model\.init_parts\.vision=.*num_layers=1 there, 2 here"):
        run_training(other)
    assert not (root / "other").exists()
    monkeypatch.setattr("train.trainer.committed", lambda path: [path])  # a run that resumes needs no source
    with pytest.raises(Prepared):
        run_training(other)


def test_more_pairs_a_batch_than_there_are_show_in_the_log(finished, monkeypatch):
    [callback] = (one for one in finished.callbacks if isinstance(one, RetrievalCallback))
    pairs = finished.corpus.stream("text", TRAIN).num_sequences(48)
    said = list[str]()
    monkeypatch.setattr(finished, "log", said.append)
    for size in (pairs, pairs + 1):
        monkeypatch.setattr(finished, "config", changed(finished.config, "training.global_batch_size", size))
        callback.before_training()
    assert len(said) == 1 and said[0].startswith(f"training.global_batch_size={pairs + 1} is more than the {pairs} tr")


def test_the_encoder_sees_what_a_language_model_shows_it(finished):
    """The same grey levels, in -1 to 1."""
    batch, engine = finished.loaders["main"].batch(0), finished.engine
    [pairs] = pair_batches(batch, engine.ids, engine.placed, len(batch.tokens_BT))
    seen = list[torch.Tensor]()
    hook = engine.placed.model.vision.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images, _ = features(engine.placed, pairs)
    hook.remove()
    language = build(finished.config.model, finished.config.precision, finished.meshes, torch.device("cpu"), 0)
    [shown] = batch_images(language, batch.images, len(batch.tokens_BT))
    assert shown is not None
    expected = shown.normalised(shown.tiles_N3SS)
    assert expected.min() < -0.9 and expected.unique().numel() > 9 and torch.equal(seen[0], expected)
    assert torch.equal(images, engine.placed.model.image_features(expected))


def test_the_held_out_loss_uses_the_learnt_scale(finished):
    engine, log_scale = finished.engine, finished.engine.placed.model.log_scale
    loader, kept, losses = finished.loaders["main"], log_scale.item(), {}
    for value in (-30.0, kept, kept + 1):
        nn.init.constant_(log_scale, value)
        losses[value] = held_out_retrieval(engine.placed, loader, engine.ids, finished.weights, 4, 4, 4).loss
    nn.init.constant_(log_scale, kept)
    assert losses[-30.0] == pytest.approx(math.log(4), abs=1e-9), "all logits are 0"
    assert len(set(losses.values())) == 3


def test_both_directions_have_their_names(finished, monkeypatch):
    [callback] = (one for one in finished.callbacks if isinstance(one, RetrievalCallback))
    said, found = list[str](), Retrieval(1.0, 0.25, 0.5, 0.125, 8, 4)
    monkeypatch.setattr("train.callbacks.retrieval.held_out_retrieval", lambda *given: found)
    monkeypatch.setattr(finished, "log", said.append)
    monkeypatch.setattr(callback.logging, "writer", None)
    monkeypatch.setattr(callback, "found", None)
    callback.measure()
    assert (
        "caption is right for 25.0% of pictures, the nearest picture for 50.0% of captions (chance 12.50%)" in said[1]
    )
    run: Any = SimpleNamespace(name="run", held_out=[{"step": 1, "retrieval": vars(found)}], has=lambda key: True)
    rows = {label: value for label, [value], _ in retrieval.rows([run])}
    assert rows["found first: captions of pictures"] == 0.25 and rows["found first: pictures of captions"] == 0.5
    drawn: dict[str, list[float]] = {}
    axes: Any = MagicMock()
    axes.plot = lambda steps, values, label, **style: drawn.update({label: values})
    retrieval.recall(axes, [run])
    assert drawn == {"captions of pictures": [0.25], "pictures of captions": [0.5], "chance": [0.125]}


def test_memory_counts_the_towers(finished, monkeypatch):
    monkeypatch.setattr("train.engine.memory.available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match="parameters with gradients and optimizer state need"):
        check_memory(finished.config, finished.meshes.layout, torch.device("cpu"))
