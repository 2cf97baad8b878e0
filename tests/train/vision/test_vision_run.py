"""A tiny run on documents with pictures: it resumes with equal losses, is evaluated, and generates after a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train.eval.answers as answers_file
from core.config import load
from core.errors import ConfigError
from data.corpus import prepare
from data.images.config import ImageTokenNames
from data.images.store import PictureStream
from data.loader import Batch, Loader
from launch.cli import main
from model.huggingface.vision import PROCESSOR_FILES, processor_files
from model.vision.encoder import VisionEncoder
from model.vision.fusion import Images
from tests.support.mixed import png, write_documents
from tests.support.tiny import EXACT, TINY
from train.config import TrainConfig
from train.eval.answers import last_tokens
from train.eval.pictures import PicturePrompt, exported_images
from train.metap.coordinates import changes

SIZES = "tile_size: 8, patch_size: 2"
VISION = [
    "+model.vision={hidden_size: 16, num_layers: 2, num_heads: 2, mlp_hidden_size: 64, adapter_hidden_size: 16, "
    f"image_token_id: 5, {SIZES}}}",
    f"+data.images={{tiles: {{{SIZES}, max_tiles: 4}}}}",
]


BUILTIN = ("code", "tests", "docstrings", "pydoc")


def data_of(root: Path) -> list[str]:
    mixed = f"+data.sources.mixed={{kind: documents, path: {root / 'in' / 'documents.jsonl'}}}"
    sizes = ["data.tokenizer.vocab_size=300", "data.held_out=0.2", f"data.cache={root / 'cache'}"]
    return ["data=files", "~data.sources.text", mixed, *sizes]


def train_in(root: Path, *overrides: str) -> int:
    usual = [f"run.root={root}", "run.name=run", "training.steps=4"]
    return main(["train", *TINY, *VISION, *data_of(root), *usual, *overrides])


@pytest.fixture
def train(tmp_path) -> Callable[..., int]:
    write_documents(tmp_path / "in")
    return partial(train_in, tmp_path)


def figures(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}


def test_a_resumed_run_sees_the_same_pictures(train, tmp_path, capsys):
    assert train("run.name=whole", "evaluation.sequences=16", "training.seq_len=96") == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            assert line["image_tokens"] <= 4 * line["tiles"] and line["tiles_per_second"] > 0
            assert line["tiles"] > 0 and line["image_token_share"] == round(line["image_tokens"] / (8 * 96), 6) < 1
            assert 0 < line["encoder_flops_share"] < 1
            apart, loads = line["loss_by_modality"], line["expert_load_by_modality"]
            assert min(apart.values()) < line["loss"] < max(apart.values())
            assert list(apart) == list(loads) == ["images", "text"]
            assert len(line["expert_overlap"]) == len(loads["text"])
    [held_out] = [line for line in lines if "heldout" in line]
    [mixed] = held_out["heldout"].values()
    parts, whole = list(mixed["modalities"].values()), mixed["loss"] * mixed["tokens"]
    assert sum(one["tokens"] for one in parts) == mixed["tokens"] and len(parts) == 2
    assert sum(one["loss"] * one["tokens"] for one in parts) == pytest.approx(whole)
    assert held_out["heldout_by_modality"] == {name: pytest.approx(one) for name, one in mixed["modalities"].items()}
    answers = held_out["answers"]["mixed"]
    assert answers["documents"] > 0 and all(0 <= answers[key] <= 1 for key in ("own", "other", "none"))
    kept = json.loads((tmp_path / "whole" / "examples" / "examples.json").read_text())
    assert kept["step"] == 4 and all(
        (tmp_path / "whole" / "examples" / n).exists() for n in kept["examples"][0]["pictures"]
    )
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "whole")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["answers"] == held_out["answers"] and printed["modalities"] == held_out["heldout_by_modality"]
    assert train("run.name=parts", "checkpoint.every=2", "training.seq_len=96") == 0
    steps = tmp_path / "parts" / "checkpoints" / "step-00000004"
    (steps / "COMPLETE").unlink() if (steps / "COMPLETE").exists() else None
    for path in steps.iterdir():
        path.unlink() if path.is_file() else None
    (tmp_path / "parts" / "summary.json").unlink()
    assert train("run.name=parts", "checkpoint.every=2", "training.seq_len=96") == 0
    assert "resuming from step-00000002" in capsys.readouterr().out
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_losses_depend_on_the_pictures(train, tmp_path):
    assert train("run.name=colour") == 0
    for place in (tmp_path / "in").glob("*.png"):
        place.write_bytes(png(99, 8, 8))
    assert train("run.name=grey") == 0
    assert figures(tmp_path / "colour")[1] != figures(tmp_path / "grey")[1]


def test_generate_reads_pictures(train, tmp_path, capsys, monkeypatch):
    assert train() == 0
    picture = tmp_path / "a.png"
    picture.write_bytes(png(3, 8, 8))
    run = str(tmp_path / "run")
    honest, encoded = VisionEncoder.forward, []
    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "forward", lambda self, tiles: encoded.append(len(tiles)) or honest(self, tiles))
        assert main(["generate", run, "word", "tokens=3", "temperature=0", f"image={picture}"]) == 0
    assert encoded == [1], "once for all tokens"
    assert capsys.readouterr().out.splitlines()[-1].startswith("word")
    for words, reason in {
        ("image=3",): "image: must be a path or a list of paths",
        (f"image={tmp_path / 'no.png'}",): "no such file",
        (f"image={picture}", "tokens=40"): "is more than the model's context of 48; try",
    }.items():
        assert main(["generate", run, "word", *words]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("kept", "calls"), [([], 1), (None, 2)])
def test_kept_rows_are_encoded_once(kept, calls):
    tiles, seen = torch.arange(12.0).view(1, 3, 2, 2), []
    for _ in range(2):
        images = Images(tiles, torch.zeros(1, 4), kept=kept)
        assert torch.equal(images.encode(lambda given: seen.append(1) or given.flatten(1)), tiles.flatten(1))
    assert len(seen) == calls


def test_an_export_answers_as_the_run_does(train, tmp_path, capsys):
    assert train("model.qk_norm=weightless", "model.router.top_k=1", "model.balance.bias_rate=0") == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    picture = tmp_path / "a.png"
    picture.write_bytes(png(3, 20, 12))
    said = []
    for source in ("run", "out"):
        capsys.readouterr()
        words = ["tokens=3", "temperature=0", f"image={picture}"]
        assert main(["generate", str(tmp_path / source), "word", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "key, value", [("image_mean", [0, 0, 0]), ("size", {"height": 9, "width": 9}), ("max_patches", 0)]
)
def test_another_processor_is_refused(tmp_path, key, value):
    model = load("train", TrainConfig, [*TINY, *VISION]).model
    assert model.vision is not None
    names = {name: number for number, name in enumerate(vars(ImageTokenNames()).values())}
    file = tmp_path / PROCESSOR_FILES[0]
    file.write_text(json.dumps(processor_files(model.vision)[file.name]))
    assert exported_images(tmp_path, model, names.get) is not None
    file.write_text(json.dumps(processor_files(model.vision)[file.name] | {key: value}))
    with pytest.raises(ConfigError, match=rf"{file.name}: {key}=.*: must be"):
        exported_images(tmp_path, model, names.get)


def test_the_coordinate_check_sees_pictures(tmp_path, monkeypatch):
    """Without pictures the encoder would not be trained, and the probe's logits would not depend on it."""
    write_documents(tmp_path / "in")
    config = load("train", TrainConfig, [*TINY, *VISION, *data_of(tmp_path), "data.packing=greedy"])
    corpus = prepare(config.data, lambda line: None)
    batches = [Loader(corpus, 48, 8, seed=0).batch(step) for step in range(2)]
    seen = changes(config, batches[:1], batches[1])
    assert seen["logits"]["change"] > 0
    blind = replace(batches[1], images=None)
    assert changes(config, batches[:1], blind)["logits"]["initial"] != seen["logits"]["initial"]


def test_the_vision_experiment_trains(tmp_path, capsys):
    small = ["data.sources.scenes.options.number=120", *(f"++data.sources.{name}.max_bytes=20000" for name in BUILTIN)]
    words = [*small, "training.steps=2", "schedule.warmup_steps=0", "evaluation.sequences=2", "data.held_out=0.3"]
    sizes = ["training.global_batch_size=4", "training.micro_batch_size=2", f"data.cache={tmp_path / 'cache'}"]
    assert main(["train", "experiment=smoke_vision", f"run.root={tmp_path}", *words, *sizes]) == 0
    assert "held-out documents of scenes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_vision_experiment_learns_to_count(tmp_path):
    """Half of the experiment. Chance is 10%; the answers to other pictures and to none are the control."""
    words = ["training.steps=250", f"data.cache={tmp_path / 'cache'}", "run.name=run", f"run.root={tmp_path}"]
    assert main(["train", "experiment=smoke_vision", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["answers"]["scenes"] for line in lines if "answers" in line][-1]
    assert found["documents"] > 300
    assert found["own"] > 0.45 and found["other"] < 0.16 and found["none"] < 0.16


def test_generated_placeholders_are_no_pictures():
    prompt = PicturePrompt([2, 4, 5, 5, 3], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), placeholder=5)
    rows = prompt.rows(torch.tensor([[0, 2, 4, 5, 5, 3, 9, 5, 5]]))
    assert rows.tolist() == [[-1, -1, -1, 0, 1, -1, -1, -1, -1]]


def test_only_documents_with_a_whole_picture_are_answers():
    ids = SimpleNamespace(start=2)
    corpus: Any = SimpleNamespace(images=SimpleNamespace(ids=ids), tokenizer=SimpleNamespace(eos_id=1, bos_id=0))
    #         cut, with a picture, picture and answer, text alone, picture and answer
    tokens = [9, 2, 5, 3, 8, 1, 0, 2, 5, 3, 7, 1, 0, 6, 6, 1, 0, 2, 5, 3, 8, 1]
    starts = [place for place, token in enumerate(tokens) if token == 0]
    positions = [place - max([0, *(s for s in starts if s <= place)]) for place in range(len(tokens))]
    labels = [-100 if token in (0, 2, 3, 5) else token for token in [*tokens[1:], 0]]
    batch = Batch(*(torch.tensor([one]) for one in (tokens, labels, positions)), torch.tensor([0]))
    found = last_tokens(batch, corpus)[0].nonzero().flatten().tolist()
    assert found == [9, 19], "the ends of a cut document and of a text are no test"


def test_answers_tell_own_pictures_from_others(train, tmp_path, monkeypatch):
    """Predict the label exactly where the tiles are those that the corpus has for this document."""
    honest, own_tiles, decode, decoded = answers_file._with, [], PictureStream._tiles, []

    def remember(batch, *rest):
        own_tiles[:] = [batch.images.decode(tile) for tiles in batch.images.tiles for tile in tiles]
        return honest(batch, *rest)

    def see(placed, batch):
        pixels = batch.images.pixels[0].numpy()
        is_own = np.array_equal(pixels, np.stack(own_tiles))
        return (batch.labels_BT if is_own else batch.labels_BT + 1 + (not pixels.any())), batch.labels_BT

    def count(stream, image):
        decoded.append((stream.name, image))
        return decode(stream, image)

    monkeypatch.setattr(PictureStream, "_tiles", count)
    monkeypatch.setattr(answers_file, "_with", remember)
    monkeypatch.setattr(answers_file, "predictions", see)
    assert train("evaluation.sequences=16", "training.seq_len=96") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [found] = [line["answers"]["mixed"] for line in lines if "answers" in line]
    rates = {"own": 1.0, "other": 0.0, "none": 0.0}
    kinds = found.pop("by_answer")
    assert found == {"documents": sum(kind["documents"] for kind in kinds.values()), **rates} and found["documents"] > 0
    assert all(kind == {"documents": kind["documents"], **rates} for kind in kinds.values())
    held_out = [image for name, image in decoded if name == "mixed-held_out"]
    assert len(held_out) == len(set(held_out)) > 2, "each picture is decoded once"


MISMATCHES = {
    "model.vision=null": "model.vision: the data have pictures (data.images), which a model without a vision encoder",
    "model.vision.patch_size=4": "data.images.tiles.patch_size=2: the model's tiles have patch_size=4",
    "model.vision.image_token_id=7": "model.vision.image_token_id=7: is not the placeholder of the tokenizer; try 5",
    "model.vision.hidden_size=20": "hidden_size=20: must be a multiple of 4 * 2 heads",
}


@pytest.mark.parametrize("override", MISMATCHES)
def test_settings_that_do_not_fit_are_refused(override, train, capsys):
    assert train(override) == 2
    assert MISMATCHES[override] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["first", "all"])
def test_a_run_whose_ranks_share_tiles_equals_one_process(train, tmp_path, stages):
    """Two pipeline stages on two data-parallel ranks, which share the tiles of the corpus's pictures."""
    same = [*EXACT, "training.seq_len=96", "training.micro_batch_size=1", "training.freeze=[router,vision_patch]"]
    shares = ["parallel.vision.over_data_parallel=true", f"parallel.vision.stages={stages}"]
    assert train("run.name=one", *same) == 0
    assert train("run.name=many", "launch=torchrun", "launch.processes=4", "parallel.pp=2", *shares, *same) == 0
    one, many = (figures(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys()
    for step, values in one.items():
        assert many[step] == pytest.approx(values, rel=1e-9)
    keys = ("tiles", "image_tokens", "image_token_share", "encoder_flops_share")
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "many")]
    logged = [[json.loads(line) for line in some if "tiles" in json.loads(line)] for some in lines]
    assert [[one[key] for key in keys] for one in logged[0]] == [[one[key] for key in keys] for one in logged[1]]
    answers = [next(one["answers"] for one in map(json.loads, reversed(some)) if "answers" in one) for some in lines]
    assert answers[0] == answers[1]
