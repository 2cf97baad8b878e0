"""The suite of the four examinations: right answers score 100% and wrong ones 0% in each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.config import load
from data.images.generated.scenes import SceneConfig, held_out, scene
from launch.cli import main
from launch.verbs.evaluate import EvaluateConfig
from tests.support import hf_models
from tests.support.tiny import TINY
from train.exam.base import Question
from train.exam.config import SuiteConfig
from train.exam.facts import FACTS
from train.exam.linear import LinearExpression, LinearSystem
from train.exam.mathematics import solution_text
from train.exam.registry import make_suite
from train.exam.run import run_suite

SNAKE = (Path(__file__).parent / "code" / "pages" / "snake.html").read_text()
SNAKES = {
    "runs": (SNAKE, 1, ""),
    "does not turn": (SNAKE.replace("next = wanted;", ";"), 0, "does not turn at ArrowDown"),
    "throws": (SNAKE.replace("way = next;", "way = nextt;"), 0, "throws ReferenceError: nextt is not defined"),
}


def suite(*without: str) -> SuiteConfig:
    found = load("evaluate", EvaluateConfig, ["run=x", "suite=representative"]).suite
    assert found is not None and list(found.exams) == ["knowledge", "system", "snake", "pencils"]
    return SuiteConfig(found.name, {label: one for label, one in found.exams.items() if label not in without})


def families(system: LinearSystem) -> Iterator[str]:
    """Yield all solutions of a system with infinitely many, in five ways."""
    found = system.solution()
    assert found is not None and system.nullity == 1 and str(found["y"]) == "t"
    x = found["x"]
    slope, start = x.terms["t"], x.constant
    double = LinearExpression(start, {"s": 2 * slope})
    yield f"infinitely many solutions: x = {x}, y = t"
    yield f"({x}, t)"
    yield f"({start}, 0) + t({slope}, 1)"
    yield f"x = {x.renamed({'t': 'y'})}"
    yield f"Let s be any number: x = {double} and y = 2s"


def right(question: Question) -> str:
    match question.reference:
        case LinearSystem():
            return f" {solution_text(question.reference)}"
        case "snake":
            return SNAKE
        case (str() as answer, _):
            return answer
        case reference:
            return ", ".join(one[0] for one in reference.items)


def wrong(question: Question) -> str:
    match question.reference:
        case LinearSystem(nullity=None):
            return " x = 1, y = 1"
        case LinearSystem():
            return " no solution"
        case "snake":
            return SNAKES["throws"][0]
        case (str() as answer, _):
            return str((int(answer) + 1) % 10)
        case reference:
            return next(list_ for list_ in map(", ".join, FACTS.values()) if reference.items[0][0] not in list_)


def scores(config: SuiteConfig, answer: Callable[[Question], str]) -> dict[str, Any]:
    line = run_suite(config, lambda questions: [answer(one) for one in questions])
    return {label: one["score"] for label, one in line["exams"].items()}


def test_right_answers_score_all_and_wrong_ones_nothing():
    """Without the snake game, which the slow test below asks for."""
    config = suite("snake")
    assert scores(config, right) == {"knowledge": 1, "system": 1, "pencils": 1}
    assert scores(config, wrong) == {"knowledge": 0, "system": 0, "pencils": 0}
    half = scores(config, lambda one: right(one) if one.id[-1] in "13579" else "")
    assert 0 < half["system"] < 1 and 0 < half["pencils"] < 1, "control: the scores are no constants"


def test_all_solutions_may_be_written_in_five_ways():
    """Controls: each way with another starting point, or another slope."""
    exam = make_suite(suite("snake", "pencils", "knowledge"))["system"]
    asked = [one for one in exam.questions() if one.reference.nullity == 1]
    assert len(asked) == 4
    for question in asked:
        one = question.reference
        shifted = LinearSystem(one.unknowns, tuple((*row[:-1], row[-1] + row[0]) for row in one.rows))
        turned = LinearSystem(one.unknowns, tuple((2 * row[0], *row[1:]) for row in one.rows))
        assert [exam.judge(question, text).score for text in families(one)] == [1] * 5
        for other in (shifted, turned):
            assert [exam.judge(question, text).score for text in families(other)] == [0] * 5


def test_pencils_are_asked_for_in_held_out_pictures():
    exam = make_suite(suite("snake", "system", "knowledge"))["pencils"]
    pictures = {one.png: one for one in (scene(held_out(index), SceneConfig()) for index in range(200))}
    for question in exam.questions():
        shown = pictures[question.pictures[0]]
        assert question.prompt == "<image>How many pencils?" and shown.kind == "pencil"
        assert question.reference[0] == str(sum(thing.kind == "pencil" for thing in shown.things))


@pytest.mark.slow
def test_all_four_with_a_snake_that_runs_and_one_that_throws():
    assert scores(suite(), right) == {"knowledge": 1, "system": 1, "snake": 1, "pencils": 1}
    assert scores(suite(), wrong) == {"knowledge": 0, "system": 0, "snake": 0, "pencils": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", SNAKES)
def test_a_snake_game_is_judged_by_what_it_does(name):
    page, score, note = SNAKES[name]
    assert name == "runs" or page != SNAKE
    found = run_suite(suite("system", "knowledge", "pencils"), lambda questions: [f"```html\n{page}```"])
    (answer,) = found["exams"]["snake"]["answers"]
    assert (answer["score"], note in answer["note"]) == (score, True)


VISION = [
    "+model.vision={hidden_size: 16, num_layers: 2, num_heads: 2, mlp_hidden_size: 64, adapter_hidden_size: 16, "
    "image_token_id: 5, tile_size: 8, patch_size: 2}",
    "+data.images={tiles: {tile_size: 8, patch_size: 2, max_tiles: 4}}",
    "+data.sources.scenes={kind: 'data.images.generated.sources:Scenes', options: {number: 60}}",
    *("data=files", "~data.sources.text", "data.tokenizer.vocab_size=300", "data.held_out=0.2"),
]


def opened(kind: str, folder: Path, small_corpus: list[str]) -> Path:
    """Return a model whose context has 1,024 tokens: a run on text or with pictures, its export, or one that only
    transformers knows.
    """
    if kind in hf_models.FOREIGN:
        return hf_models.FOREIGN[kind](folder / kind, 1024)
    data = [*VISION, f"data.cache={folder / 'cache'}"] if "vision" in kind else small_corpus
    sizes = ["training.seq_len=1024", "training.global_batch_size=2", "training.steps=1", "model.balance.bias_rate=0"]
    assert main(["train", *TINY, *data, *sizes, f"run.root={folder}", "run.name=run"]) == 0
    if "exported" in kind:
        assert main(["export", str(folder / "run"), str(folder / "hf")]) == 0
    return folder / ("hf" if "exported" in kind else "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text run", "vision run", "vision exported", "gpt2", "llava"])
def test_every_kind_of_model_is_asked_all_four(kind, tmp_path, small_corpus, capsys):
    """A model without an encoder is not asked about pictures, and the rest goes on."""
    model = opened(kind, tmp_path, small_corpus)
    capsys.readouterr()
    assert main(["evaluate", str(model), "suite=representative"]) == 0
    found = json.loads(capsys.readouterr().out)["exams"]
    sees = "vision" in kind or kind == "llava"
    asked = {label: one["questions"] - one["outcomes"]["not_asked"] for label, one in found.items()}
    assert asked == {"knowledge": 10, "system": 12, "snake": 1, "pencils": 20 if sees else 0}
    assert (found["pencils"]["score"] is None) != sees
    assert all(one["outcomes"]["judge_failed"] == 0 for one in found.values())
    assert found["snake"]["machine"]["chromium"].startswith("Chromium")
