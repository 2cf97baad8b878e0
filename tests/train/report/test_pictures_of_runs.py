"""The report of a run with pictures: losses, answers and loads by modality, and held-out pictures with answers."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.support.mixed import png
from tests.train.report.runs import make_run
from train.report import plots
from train.report.files import RunFiles
from train.report.plots import draw
from train.report.run import RunData

NAME = f"{'0' * 15}a.png"
ONE = {"source": "scenes", "question": "How <b>many</b> boxes?", "answer": " 3", "predicted": " 5", "is_right": False}


def write_examples(run: Path, *examples: dict[str, Any]) -> None:
    (run / "examples").mkdir(exist_ok=True)
    (run / "examples" / NAME).write_bytes(png(1, 8, 8))
    (run / "examples" / "examples.json").write_text(json.dumps({"step": 6, "examples": examples}))


def seeing(directory: Path) -> Path:
    """Write the files of a run with pictures. The second logged step has no image."""
    run = make_run(directory, steps=6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {"documents": 12, "own": 0.75, "other": 0.125, "none": 0.0625}
    for number, line in enumerate(lines):
        if "heldout_loss" in line:
            losses = {name: {"loss": loss} for name, loss in (("images", 1.25), ("text", 5.5))}
            line |= {"heldout_by_modality": losses, "answers": {"scenes": rates}}
        elif number != 1:
            loads = line["expert_load"]
            line |= {"loss_by_modality": {"images": 1.5, "text": 5.75}, "expert_overlap": [0.25] * len(loads)}
            line["expert_load_by_modality"] = {"images": loads, "text": loads}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_examples(run, {**ONE, "pictures": [NAME], "more": 3}, {**ONE, "pictures": [], "more": 0, "is_right": True})
    return run


def page_of(run: Path) -> str:
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def test_the_page_shows_pictures_with_answers(tmp_path, undrawn):
    text = page_of(seeing(tmp_path / "run"))
    assert text.count(f"data:image/png;base64,{base64.b64encode(png(1, 8, 8)).decode()}") == 1
    assert "and 3 more pictures" in text and "How &lt;b&gt;many&lt;/b&gt; boxes?" in text and "<b>many" not in text
    assert re.findall(r"class=(right|wrong)>Predicted: <code> 5</code>\n\((right|wrong)\)", text) == [
        ("wrong", "wrong"),
        ("right", "right"),
    ]
    rows = dict(re.findall(r"<tr><td>(.*?)</td><td class=n>(.*?)</td></tr>", text))
    assert rows["held-out loss: documents with images"] == "1.2500" and rows["held-out loss: text alone"] == "5.5000"
    assert rows["right answers: scenes, own pictures"] == "75.0%"
    assert rows["right answers: scenes, black pictures"] == "6.2%"
    without = page_of(make_run(tmp_path / "text"))
    assert "right answers" not in without and "with images" not in without and "Predicted" not in without


def test_plots_by_modality_are_drawn_where_there_are_images(tmp_path, recwarn, monkeypatch):
    runs = [RunData(seeing(tmp_path / "one")), RunData(make_run(tmp_path / "two", steps=6))]
    names = [picture.name for picture in draw(runs[:1])]
    new = ["loss_by_modality", "answers", "expert_load_images", "expert_load_text", "expert_overlap"]
    assert [name for name in names if name in new] == new and len(names) == 15
    assert runs[0].layer_steps("images") == [2, 6] and runs[0].layer_steps() == [2, 4, 6]
    assert not recwarn.list
    monkeypatch.setattr(plots, "_picture", lambda name, *rest, **more: name)
    of_both: list[Any] = draw(runs)
    assert [name for name in of_both if any(one in name for one in new[2:])] == [f"{name}_1" for name in new[2:]]


def missing(run: Path) -> None:
    (run / "examples" / NAME).unlink()


def linked(run: Path) -> None:
    (run / "secret.png").write_bytes(png(2, 8, 8))
    missing(run)
    (run / "examples" / NAME).symlink_to(run / "secret.png")


def elsewhere(run: Path) -> None:
    (run / "secret.png").write_bytes(png(2, 8, 8))
    write_examples(run, {**ONE, "pictures": ["../secret.png"], "more": 0})


DAMAGE: dict[Any, str] = {
    missing: "pictures are missing or damaged: 1",
    linked: "pictures are missing or damaged: 1",
    elsewhere: "pictures are missing or damaged: 1",
    (lambda run: (run / "examples" / NAME).write_bytes(b"GIF89a")): "pictures are missing or damaged: 1",
    (lambda run: (run / "examples" / NAME).write_bytes(png(1, 8, 8) + bytes(1 << 20))): "missing or damaged: 1",
    (lambda run: (run / "examples" / "examples.json").write_text("{}")): "cannot be read",
    (lambda run: write_examples(run, {**ONE, "pictures": [3], "more": 0})): "cannot be read",
    (lambda run: (run / "examples" / "examples.json").write_text("[" * 10**5)): "cannot be read",
}


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_examples_are_left_out(tmp_path, number):
    change, message = list(DAMAGE.items())[number]
    write_examples(make_run(tmp_path / "run", steps=2), {**ONE, "pictures": [NAME], "more": 0})
    files = RunFiles(tmp_path / "run")
    assert [one["pngs"] for one in files.examples()] == [[png(1, 8, 8)]] and files.problems == {}, "control"
    change(tmp_path / "run")
    assert [png for one in files.examples() for png in one["pngs"]] == []
    assert message in files.problems["examples/examples.json"]
