"""Examinations during training: results at each step, no trace in what is learnt, resumes, failures and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.errors import ConfigError
from launch.cli import main
from tests.support.tiny import TINY, config, saved, trainer
from train.callbacks.suites import Suite, SuiteCallback, check_questions, make_suites
from train.config import check
from train.corpus import get_corpus
from train.eval.generate import CachedModel
from train.exam.base import Outcome, Question, Verdict
from train.exam.config import SuiteConfig
from train.exam.registry import read_suites
from train.exam.results import asked_before
from train.overlap import search
from train.run_directory import read_lines

PLANTED = "the model reads a line and writes another def return if else while for"
"""The beginning of the first document of each source of the small corpus, without its number."""


@dataclass(frozen=True)
class Echo:
    """Two questions: one in the small corpus and one that is not. Judges crash on `fails`."""

    fails: str = "nothing"
    name, version = "echo", 1

    def questions(self) -> Sequence[Question]:
        other = " ".join(sorted(PLANTED.split()))
        return [
            Question(name, text, name, max_tokens=3, own_text=text) for name, text in (("in", PLANTED), ("out", other))
        ]

    def judge(self, question: Question, answer: str) -> Verdict:
        if self.fails == "judge":
            raise KeyError("a fault")
        is_right = question.reference == "in"
        return Verdict(Outcome.right if is_right else Outcome.wrong, int(is_right))

    @property
    def limits(self) -> int:
        return 1

    def machine(self) -> dict[str, str]:
        if self.fails == "machine":
            raise OSError("the sandbox is gone")
        return {}


def suite(folder: Path, name: str = "short", **options: str) -> str:
    """Write a suite, and return the override that names it."""
    exam = {"exam": f"{__name__}:Echo", "options": options}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"exams": {"echo": exam}}))
    return f"evaluation.suites=[{path}]"


def asked(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "evaluations.jsonl")]


def weights(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.engine.placed.model.state_dict().items()}


def test_training_with_suites_learns_the_same(tmp_path, small_corpus, monkeypatch):
    """Control: a callback that leaves the model in evaluation mode would be noticed."""
    steps = [*small_corpus, "training.steps=3"]
    plain, with_suites = trainer(tmp_path, "plain", steps), None
    assert plain.fit() == 0
    with_suites = trainer(tmp_path, "asked", [*steps, suite(tmp_path), "evaluation.suites_every=1"])
    assert with_suites.fit() == 0 and with_suites.engine.placed.model.training
    assert asked(tmp_path / "asked") == [1, 2, 3]
    first, second = weights(plain), weights(with_suites)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    line = next(read_lines(tmp_path / "asked" / "evaluations.jsonl"))
    assert line["suite"] == "short" and line["model"] is None and line["exams"]["echo"]["score"] == 0.5
    shown = [one["examinations"] for one in read_lines(tmp_path / "asked/metrics.jsonl") if "examinations" in one]
    assert len(shown) == 3 and shown[0]["short/echo"]["score"] == 0.5 < shown[0]["short/echo"]["high"]
    assert "examination short/echo: 0.500 (" in (tmp_path / "asked/log.txt").read_text()
    exam = f"+suite.exams.echo={{exam: '{__name__}:Echo'}}"
    assert main(["evaluate", str(tmp_path / "asked"), "suite=own", "suite.name=short", exam]) == 0
    (*_, last, verb) = read_lines(tmp_path / "asked" / "evaluations.jsonl")
    assert verb["step"] == last["step"] == 3 and verb["model"] is not None and verb.keys() == last.keys()
    assert verb["exams"] == last["exams"], "the verb finds the same"
    forward = CachedModel.begin

    def disturbing(self, *arguments):
        next(with_suites.engine.placed.model.parameters()).data.add_(1e-3)
        return forward(self, *arguments)

    monkeypatch.setattr(CachedModel, "begin", disturbing)
    with_suites = trainer(tmp_path, "disturbed", [*steps, suite(tmp_path), "evaluation.suites_every=1"])
    with_suites.fit()
    assert not all(torch.equal(first[name], value) for name, value in weights(with_suites).items()), "control"


def test_the_questions_are_looked_for_in_the_training_corpus(tmp_path, small_corpus, monkeypatch):
    """The question that is in the corpus is found, the other is not. The search is not repeated."""
    words = [*small_corpus, suite(tmp_path), "training.steps=2", "evaluation.suites_every=1"]
    assert trainer(tmp_path, "run", words).fit() == 0
    lines = list(read_lines(tmp_path / "run" / "evaluations.jsonl"))
    beside = lines[0]["exams"]["echo"]["contamination"]
    assert beside["status"] == "searched" and beside["ids_found"] == ["in"] and beside["corpus_tokens"] > 1000
    assert (beside["score_found"], beside["score_clean"], beside["found"], beside["clean"]) == (1, 0, 1, 1)
    assert lines[1]["exams"]["echo"]["contamination"] == beside
    assert "1 of 2 questions in training text, score on these 1.000" in (tmp_path / "run/log.txt").read_text()
    read = []
    monkeypatch.setattr(search, "block_texts", lambda *block: read.append(block) or [])
    more = [*words[:-2], "training.steps=2", "evaluation.suites_every=1", "+phases=[{name: more, steps: 1}]"]
    assert trainer(tmp_path, "run", more).fit() == 0 and not read, "the run's directory has the result"
    assert asked(tmp_path / "run") == [1, 2, 3], "a run that resumes does not ask again, but at its next steps"
    assert trainer(tmp_path, "other", words).fit() == 0 and read, "control: another run searches"
    found = next(read_lines(tmp_path / "other" / "evaluations.jsonl"))["exams"]["echo"]["contamination"]
    assert found["found"] == 0, "control: nothing is found in no text"
    assert trainer(tmp_path, "off", [*words, "evaluation.search_tokens=0"]).fit() == 0
    found = next(read_lines(tmp_path / "off" / "evaluations.jsonl"))["exams"]["echo"]["contamination"]
    assert found == {"status": "not looked for", "why": "evaluation.search_tokens=0"}
    assert "; questions not looked for in training text)" in (tmp_path / "off/log.txt").read_text()


def test_a_resumed_run_has_each_line_once(tmp_path, small_corpus):
    """A run that is interrupted after step 3 resumes from step 2: the line of step 3 is trimmed and made again, that of
    step 2, which had not been written, is made up for, and that of step 1 stays.
    """
    words = [*small_corpus, suite(tmp_path), "training.steps=4", "evaluation.suites_every=1"]
    run = trainer(tmp_path, "run", words)
    for callback in run.callbacks:
        callback.before_training()
    for step in range(3):
        metrics = run.train_step(step)
        for callback in run.callbacks:
            callback.after_step(step + 1, metrics)
        if step == 1:
            run.save()
            run.checkpointer.wait()
    path = tmp_path / "run" / "evaluations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2] + lines[2][:40])  # as if step 2 had been interrupted
    again = trainer(tmp_path, "run", words)
    assert again.step == 2 and asked(tmp_path / "run") == [1]
    assert again.fit() == 0 and asked(tmp_path / "run") == [1, 2, 3, 4]
    (tmp_path / "run" / "summary.json").unlink()
    assert trainer(tmp_path, "run", words).fit() == 0 and asked(tmp_path / "run") == [1, 2, 3, 4]
    line = list(read_lines(path))[-1]
    prints = {"echo": line["exams"]["echo"]["fingerprint"]}
    assert asked_before(path, 4, "short", prints) and not asked_before(path, 4, "short", {"echo": "other"}), "control"


def test_a_file_of_results_that_cannot_be_read_is_one_line(tmp_path, small_corpus):
    """It is refused before training, with and without suites. Control: the run resumes once it is moved away."""
    words = [*small_corpus, suite(tmp_path), "training.steps=2"]
    saved(tmp_path, "run", words)
    path = tmp_path / "run" / "evaluations.jsonl"
    path.mkdir()
    with pytest.raises(ConfigError, match=r"evaluations\.jsonl cannot be read \(.*\); move it away") as caught:
        trainer(tmp_path, "run", words)
    assert "\n" not in str(caught.value) and caught.value.key == "run.name"
    (tmp_path / "new" / path.name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="move it away"):
        SuiteCallback._names_to_ask(SimpleNamespace(suites={"a": Suite(SuiteConfig(), {})}, trainer=resumed(tmp_path)))  # type: ignore[arg-type]
    path.rmdir()
    assert trainer(tmp_path, "run", words).step == 1


def resumed(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(step=1, directory=SimpleNamespace(evaluations=folder / "new" / "evaluations.jsonl"))


FAILURES = {
    "judge": ("", None),
    "machine": ("suite short has no result at step 1: OSError: the sandbox is gone", None),
    "disk": ("evaluations.jsonl: Is a directory; a line of it is lost", None),
    "model": ("suite short has no result at step 1: RuntimeError: out of memory", "begin"),
}


@pytest.mark.parametrize("what", [pytest.param(one, marks=[pytest.mark.slow] * (one != "model")) for one in FAILURES])
def test_a_failure_is_logged_and_the_run_goes_on(tmp_path, small_corpus, monkeypatch, what):
    reason, broken = FAILURES[what]

    def fail(*arguments):
        raise RuntimeError("out of memory")

    words = [*small_corpus, suite(tmp_path, fails=what), "training.steps=2", "evaluation.suites_every=1"]
    if what == "disk":
        (tmp_path / "run" / "evaluations.jsonl").mkdir(parents=True)
        monkeypatch.setattr("train.callbacks.suites.asked_before", lambda *arguments: False)
        monkeypatch.setattr("train.trainer.RunDirectory.trim_metrics", lambda *arguments: None)
    if broken:
        monkeypatch.setattr(CachedModel, broken, fail)
    assert trainer(tmp_path, "run", words).fit() == 0
    assert reason in (tmp_path / "run" / "log.txt").read_text()
    if what == "judge":
        (first, _) = read_lines(tmp_path / "run" / "evaluations.jsonl")
        assert first["exams"]["echo"]["outcomes"]["judge_failed"] == 2


REFUSED = {
    "name": (["evaluation.suites=[smok]"], "evaluation.suites=smok: no such suite; a file must end in .yaml; try"),
    "every": (["evaluation.suites_every=2"], "evaluation.suites_every=2: applies to suites only"),
    "option": (["evaluation.suites=[OPTION]"], "suite.exams.a.options.numbr: no such key"),
    "context": (
        ["evaluation.suites=[smoke]"],
        "evaluation.suites=smoke: nothing of it can be asked; systems: it takes",
    ),
    "pictures": (["evaluation.suites=[scenes]"], "nothing of it can be asked; count: the model has no encoder"),
}
UNREADABLE = {
    "own": "suites=own: no such suite",
    "nothing.yaml": "suites=nothing.yaml: cannot be read: No such file",
    "smoke smoke": "two suites are called smoke",
    "BAD": "line 1, column 5",
    "LIST": "needs keys and values, not one value",
    "EMPTY": "has no examination (exams)",
    "KEY": "exam: no such key",
}
FILES = {
    "BAD": "a: {",
    "LIST": "[1]",
    "EMPTY": "{}",
    "KEY": "{exam: 1}",
    "OPTION": "{exams: {a: {exam: quadratics, options: {numbr: 1}}}}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_suite_is_refused_before_the_weights(tmp_path, small_corpus, capsys, monkeypatch, name):
    """Control: the same command without the suite trains, in `test_training_with_suites_learns_the_same`."""
    words, reason = REFUSED[name]
    for file, text in FILES.items():
        (tmp_path / f"{file}.yaml").write_text(text)
        words = [word.replace(f"[{file}]", f"[{tmp_path / file}.yaml]") for word in words]
    monkeypatch.setattr("train.engine.objective.build", lambda *arguments: pytest.fail("weights are allocated"))
    capsys.readouterr()
    assert main(["train", *TINY, *small_corpus, f"run.root={tmp_path}", "run.name=run", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert reason in line and line.startswith("leviathan: error: evaluation.suites"), line


@pytest.mark.parametrize("names", UNREADABLE)
def test_a_suite_that_cannot_be_read_is_one_line(tmp_path, names):
    for file, text in FILES.items():
        (tmp_path / f"{file}.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_suites([str(tmp_path / f"{name}.yaml") if name in FILES else name for name in names.split()])
    assert UNREADABLE[names] in str(caught.value) and "\n" not in str(caught.value)


def test_layouts_that_divide_sequences_or_layers_are_refused(tmp_path, small_corpus):
    run = config(tmp_path, "run", *small_corpus, "evaluation.suites=[smoke]", "training.seq_len=64")
    for axis in ("tp", "cp", "pp"):
        with pytest.raises(ConfigError, match="afterwards, one process can: leviathan evaluate RUN suite=NAME"):
            check(replace(run, parallel=replace(run.parallel, **{axis: 2})), 2)
    check(run, 2)


def test_a_missing_sandbox_is_refused_before_the_start(tmp_path, small_corpus, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    run = config(tmp_path, "run", *small_corpus, "evaluation.suites=[code]")
    with pytest.raises(ConfigError, match=r"evaluation\.suites: suite\.exams\.programs.* apt install bubblewrap"):
        make_suites(run.evaluation)


def test_questions_must_fit_the_phases_in_which_they_are_asked(tmp_path, small_corpus):
    """The long phase comes last: with `suites_every=0` the questions are asked in it alone."""
    base = [*small_corpus, suite(tmp_path), "training.seq_len=8", "+phases=[{name: long, steps: 2, seq_len: 48}]"]
    base += ["model.attention_chunk_size=8"]
    for more, fits in ((["evaluation.suites_every=0"], True), (["evaluation.suites_every=3"], False)):
        run = config(tmp_path, "run", *base, *more)
        corpus = get_corpus(run, trainer(tmp_path, "any", small_corpus).world, lambda line: None)
        if fits:
            check_questions(run, make_suites(run.evaluation), corpus)
        else:
            with pytest.raises(ConfigError, match="tokens, but the model's context is 8"):
                check_questions(run, make_suites(run.evaluation), corpus)
