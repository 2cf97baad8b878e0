"""The evaluation harness asks our model about pictures: local task, local parquet, nothing fetched."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import ConfigError
from data.images.canvas import placeholder_ids
from data.images.decode import decode
from data.images.tiles import GREYS, tiles
from launch.cli import main
from model.vision.encoder import VisionEncoder
from parallel.comm.world import World
from tests.support.mixed import TINY_PICTURES, png
from tests.support.tiny import TINY
from train.eval.generate import CachedModel
from train.eval.lm_eval import HarnessModel, open_scoring_model
from train.eval.multimodal import place_tiles, question

ALONE = World(0, 1, torch.device("cpu"))
CHOICE = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_image: [{columns}]
doc_to_text: "{text}"
doc_to_choice: [" 1", " 2", " 3"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
GENERATE = """task: say
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_image: [a]
doc_to_text: "<image>How many boxes?"
doc_to_target: "1"
generation_kwargs: {{max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("pictures")
    data = ["data=files", "~data.sources.text", "data.tokenizer.vocab_size=300", "data.held_out=0.2"]
    words = [*data, f"data.cache={root / 'cache'}", "training.seq_len=64", f"run.root={root}", "run.name=run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        assert main(["train", *TINY, *TINY_PICTURES, *words, "training.steps=30", "optimizer.lr=0.01"]) == 0
        yield root / "run"


def parquet(path: Path, first: list[bytes], second: list[bytes]) -> Path:
    import pyarrow
    import pyarrow.parquet

    columns = {name: [{"bytes": one, "path": None} for one in some] for name, some in {"a": first, "b": second}.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def evaluated(run: Path, folder: Path, tasks: str, pictures: list[bytes], text: str = "<image>How many boxes?") -> Any:
    folder.mkdir()
    path = parquet(folder / "test.parquet", pictures, pictures[::-1])
    (folder / "one.yaml").write_text(CHOICE.format(name="one", path=path, columns="a", text=text))
    two = CHOICE.format(name="two", path=path, columns="a, b", text="first <image> second <image>How many?")
    (folder / "two.yaml").write_text(two)
    (folder / "say.yaml").write_text(GENERATE.format(path=path))
    out = folder / "out.json"
    assert main(["evaluate", str(run), f"tasks={tasks}", f"task_path={folder}", f"out={out}"]) == 0
    return json.loads(out.read_text())["samples"]


def scores(samples: Any, task: str) -> list[list[float]]:
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples[task]]


def plain(run: Path, before: list[Any], choice: str) -> float:
    """Return the log-probability of a choice after texts and pictures, by one call of the whole model."""
    who: Any = open_scoring_model(run, ALONE)
    images, ids, pixels = who.images, [who.tokenizer.bos_id], []
    for part in before:
        if isinstance(part, str):
            ids += who.tokenizer.encode([part])[0]
        else:
            canvas, found = tiles(decode(part, "picture"), images.tiles)
            ids += placeholder_ids(canvas, images.tiles.tokens_per_tile, images.ids).tolist()
            pixels.append(found)
    after = who.tokenizer.encode([choice])[0]
    values = torch.tensor(GREYS)[torch.from_numpy(np.concatenate(pixels)).int()]
    with torch.no_grad():
        logits = who.network(torch.tensor([[*ids, *after[:-1]]]), pixels=values)[0, len(ids) - 1 :]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum())


@pytest.fixture(scope="module")
def harness(run) -> HarnessModel:
    return HarnessModel(open_scoring_model(run, ALONE), 2)


@pytest.mark.slow
def test_scores_need_the_picture_and_are_plain_arithmetic(run, tmp_path):
    """One and two pictures, wide and square. The control shows other pictures."""
    pictures = [png(1, 16, 8), png(2, 8, 8)]
    found = evaluated(run, tmp_path / "a", "[one,two,say]", pictures)
    for place, picture in enumerate(pictures):
        for number, choice in enumerate((" 1", " 2", " 3")):
            one, two = (scores(found, task)[place][number] for task in ("one", "two"))
            assert one == pytest.approx(plain(run, [picture, "How many boxes?"], choice), abs=1e-4)
            both = ["first ", picture, " second ", pictures[1 - place], "How many?"]
            assert two == pytest.approx(plain(run, both, choice), abs=1e-4)
    assert all(len(sample["resps"][0][0]) > 0 for sample in found["say"])
    assert b"PNG" not in json.dumps(found).encode(), "samples have hashes of the pictures"
    other = evaluated(run, tmp_path / "b", "[one]", [png(8, 16, 8), png(9, 8, 8)])
    for mine, theirs in zip(scores(found, "one"), scores(other, "one"), strict=True):
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) > 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_generation_reads_the_picture_and_may_fill_the_context(harness):
    ask = lambda picture, tokens: harness.generate_until(  # noqa: E731
        [SimpleNamespace(args=("<image>word", {"max_gen_toks": tokens, "until": []}, {"visual": [picture]}))]
    )
    logits = []
    for number in (3, 4):
        asked = question("<image>word", png(number, 8, 8), harness.model.images, lambda part: [9] * len(part))
        assert asked.pixels_N3SS is not None and asked.last == "word"
        ids = [0, *asked.ids, 9, 5]  # the last placeholder is a generated one
        given = torch.tensor([ids])
        shown = harness.model.logits(given, harness.model.placed_tiles(given, asked.pixels_N3SS, len(asked.ids) + 1))
        logits.append(shown[0, -1])
    assert not torch.allclose(*logits)
    assert ask(png(3, 8, 8), 10**6) == ask(Image.open(io.BytesIO(png(3, 8, 8))), 10**6)


@pytest.mark.slow
@torch.no_grad()
def test_generation_encodes_the_pictures_once(harness, monkeypatch):
    honest, encoded, passes = VisionEncoder.forward, [], []
    encode = lambda self, tiles: (encoded.append(len(tiles)), honest(self, tiles))[1]  # noqa: E731
    run = CachedModel._run
    monkeypatch.setattr(VisionEncoder, "forward", encode)
    monkeypatch.setattr(CachedModel, "_run", lambda *given: (passes.append(given[1].shape), run(*given))[1])
    options: dict[str, Any] = {"max_gen_toks": 4, "until": []}
    shown = [(png(3, 8, 8), "<image>word"), (png(4, 8, 8), "a longer text <image>word")]
    asked = [SimpleNamespace(args=(text, options, {"visual": [picture]})) for picture, text in shown]
    asked.append(SimpleNamespace(args=("no picture", options)))
    together = HarnessModel(harness.model, 3).generate_until(asked)
    assert len(passes) > 1 and encoded == [2]
    encoded.clear()
    assert together == HarnessModel(harness.model, 1).generate_until(asked) and encoded == [1, 1]
    tokens = torch.tensor([[0, 5, 5, 5, 5]])[:, : 1 + harness.model.network.config.vision.tokens_per_tile]
    for _ in range(2):
        shown = harness.model.placed_tiles(tokens, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
        harness.model.logits(tokens, shown)
    assert encoded == [1] * 4, "the control keeps nothing"


def test_only_placeholders_of_the_question_show_tiles():
    tokens, pixels = torch.tensor([[0, 2, 5, 5, 3, 9, 5]]), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for length, last in ((5, -1), (None, 2)):
        images = place_tiles(tokens, pixels, 5, torch.device("cpu"), length)
        assert images.rows_BT.tolist() == [[-1, -1, 0, 1, -1, -1, last]]


REFUSED = {
    "no place for it": ("How many?", [png(1, 8, 8)], "has 1 pictures, but 0 times <image> in its text"),
    "one too few": ("<image><image>", [png(1, 8, 8)], "has 1 pictures, but 2 times <image> in its text"),
    "damaged": ("<image>", [png(1, 8, 8)[:60]], "picture 0"),
    "a path": ("<image>", ["/etc/hostname"], "has no bytes: store pictures in the task's data"),
    "a path in parquet": ("<image>", [{"bytes": None, "path": "a.png"}], "has no bytes"),
    "too long": ("<image>" * 9, [[png(1, 16, 16)] * 9], "tokens, but the model's context is 64"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_question_that_cannot_be_asked_is_one_line(harness, name):
    text, visuals, reason = REFUSED[name]
    for ask in (harness.loglikelihood, harness.generate_until):
        second: Any = " 1" if ask == harness.loglikelihood else {"max_gen_toks": 2}
        with pytest.raises(ConfigError) as caught:
            ask([SimpleNamespace(args=(text, second, {"visual": visuals}))])
        assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_task_that_names_no_column_is_one_line(run, tmp_path, capsys):
    path = parquet(tmp_path / "test.parquet", [png(1, 8, 8)], [png(2, 8, 8)])
    (tmp_path / "one.yaml").write_text(CHOICE.format(name="one", path=path, columns="nothing", text="<image>How many?"))
    assert main(["evaluate", str(run), "tasks=[one]", f"task_path={tmp_path}"]) == 2
    assert "tasks=one: a task cannot be asked: " in capsys.readouterr().err


def test_a_model_without_an_encoder_refuses_pictures():
    with pytest.raises(ConfigError, match="no tokens or no encoder"):
        question("<image>", [png(1, 8, 8)], None, lambda part: [])
    assert question("no picture", None, None, lambda part: []).pixels_N3SS is None
