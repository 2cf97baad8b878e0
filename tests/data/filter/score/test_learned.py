"""The learned scorer: it tells hard from easy inside length buckets, no record is scored by a model that learned from
it, a stored scorer scores the same, and labels from which nothing can be learned are rejected.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from bench.data.problems import make_problems
from core.errors import ConfigError, DataError, LeviathanError
from core.files import sha256_text
from data.filter import pipeline
from data.filter.audit.separation import auc, length_buckets
from data.filter.config import FeatureKind, FilterRules, ScorerConfig, ScorerKind, decisive_settings, without_defaults
from data.filter.input.records import Record
from data.filter.pipeline import Filter
from data.filter.score import learned, linear
from data.filter.score.baselines import LengthScorer
from data.filter.score.ensemble import EnsembleScorer
from data.filter.score.factory import Models, check_models
from data.filter.score.features import features_of
from data.filter.score.learned import LearnedScorer, quotas_of, stored_in
from data.filter.score.scorer import Direction
from data.filter.store import OneWorker
from tests.data.filter.threads import on_threads
from tests.support.filtering import FixedScorer, filtered, job, outputs, write_lines, write_outputs


@cache
def problems(seed: int, count: int = 400) -> tuple[Record, ...]:
    found = make_problems(count, seed)
    return tuple(replace(one.record(number), label=one.label) for number, one in enumerate(found))


def fitted(
    records: Any, folder: Path, labeler: Any = None, reports: list[str] | None = None, **settings: Any
) -> LearnedScorer:
    scorer = LearnedScorer(ScorerConfig(ScorerKind.learned, **settings), folder, labeler)
    scorer.report = [].append if reports is None else reports.append
    scorer.fit(lambda: iter(records))
    return scorer


def labels_of(records: Any) -> np.ndarray:
    return np.array([record.label for record in records], np.float64)


def relabelled(records: Any, labels: Any) -> list[Record]:
    return [replace(record, label=label) for record, label in zip(records, labels, strict=True)]


def area(scores: np.ndarray, records: Any, buckets: int = 8) -> float:
    """Return the AUC inside domains and buckets of answer length."""
    lengths, names = LengthScorer().score(records), [record.domain for record in records]
    found = np.zeros(len(records), np.int64)
    for number, name in enumerate(sorted(set(names))):
        mine = np.flatnonzero([one == name for one in names])
        found[mine] = number * 100 + length_buckets(lengths[mine].astype(np.int64), buckets)
    return auc({"": scores}, labels_of(records), found, resamples=0)[""].value


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_it_tells_hard_from_easy_inside_length_buckets(tmp_path, seed):
    """Control: shuffled labels teach nothing, and neither does the length."""
    records = problems(seed)
    scores = fitted(records, tmp_path / "true", labels=200).score(records)
    assert area(scores, records) > 0.85
    assert area(LengthScorer().score(records), records) < 0.75
    shuffled = labels_of(records)
    random.Random(seed).shuffle(shuffled)
    noise = relabelled(records, shuffled)
    assert abs(area(fitted(noise, tmp_path / "noise", labels=200).score(noise), noise) - 0.5) < 0.06


def test_no_record_is_scored_by_a_model_that_learned_from_it(tmp_path):
    """The labels are noise, which only a model that learned from them can know. Control: the model of all labels."""
    records = problems(4, 240)
    noise = relabelled(records, np.random.default_rng(0).normal(size=len(records)))
    scorer = fitted(noise, tmp_path)
    model = scorer.model
    assert model is not None
    own = area(scorer.score(noise), noise, 1)
    leaky = model.predict(model.weighting.vectors(noise), np.full(len(noise), linear.FOLDS))
    assert own < 0.55 and area(leaky, noise, 1) > 0.6
    models = model.models_of(noise)
    for name in {one.domain for one in noise}:
        mine = models[[one.domain == name for one in noise]]
        assert np.ptp(np.bincount(mine, minlength=5)) <= 1, "each fold has a fifth of the labels of each domain"
    shouted = [replace(one, text=one.text.upper().replace(" ", "  "), id="copy") for one in noise]
    assert model.models_of(shouted).tolist() == models.tolist(), "copies are in the fold of their original"
    assert set(model.models_of(problems(5, 40))) == {linear.FOLDS}


def test_a_label_changes_only_the_scores_of_other_folds(tmp_path):
    records = list(problems(4, 240))
    before = fitted(records, tmp_path / "a")
    changed = [replace(records[0], label=99.0), *records[1:]]
    after = fitted(changed, tmp_path / "b")
    assert before.model and after.model
    models = before.model.models_of(records)
    same = before.score(records) == after.score(records)
    assert same[models == models[0]].all() and not same[models != models[0]].any()


def test_a_stored_scorer_scores_the_same_to_the_bit(tmp_path):
    records, others = problems(4, 240), problems(5, 40)
    scorer = fitted(records, tmp_path)
    stored = LearnedScorer(ScorerConfig(ScorerKind.learned, model=str(scorer.directory)), tmp_path)
    stored.report = pytest.fail
    stored.fit(lambda: others)
    for some in (records, others):
        assert stored.score(some).tobytes() == scorer.score(some).tobytes()
    one_by_one = np.concatenate([stored.score([record]) for record in others])
    assert one_by_one.tobytes() == stored.score(others).tobytes(), "a score does not depend on the batch"
    assert scorer.model and scorer.model.facts["labels"] == 240


def test_a_stored_scorer_of_the_same_records_is_used_again(tmp_path, monkeypatch):
    records = problems(4, 240)
    scores = fitted(records, tmp_path).score(records)
    monkeypatch.setattr(learned, "learn", lambda *arguments: pytest.fail("learned again"))
    assert fitted(records, tmp_path).score(records).tobytes() == scores.tobytes()
    for change in ({"label": 99.0}, {"domain": "other"}, {"text": records[0].text + "!"}):
        with pytest.raises(pytest.fail.Exception, match="learned again"):
            fitted([replace(records[0], **change), *records[1:]], tmp_path)


DAMAGES = ["nothing", "cut", "swapped", "no numbers", "foreign", "pickled", "version", "direction"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_model_is_one_clear_error(tmp_path, damage):
    model = fitted(problems(4, 60), tmp_path / "here").directory
    arrays, facts = model / linear.ARRAYS, model / linear.FACTS
    match damage:
        case "nothing":
            facts.unlink()
        case "cut":
            arrays.write_bytes(arrays.read_bytes()[:-500])
        case "swapped":
            other = fitted(problems(5, 60), tmp_path / "there").directory
            arrays.write_bytes((other / linear.ARRAYS).read_bytes())
        case "no numbers":
            found = dict(np.load(arrays))
            np.savez(arrays, **{**found, "columns": found["columns"][:3]})
        case "foreign":
            np.savez(arrays, weights=np.ones(3))
        case "pickled":
            np.savez(arrays, idf_C=np.array([print], object))
        case "version":
            facts.write_text(json.dumps({**json.loads(facts.read_text()), "features": "0"}))
        case "direction":
            facts.write_text(json.dumps({**json.loads(facts.read_text()), "direction": "up"}))
    with pytest.raises(ConfigError, match=r"^model=.*holds (no|a damaged or foreign) learned scorer"):
        LearnedScorer(ScorerConfig(ScorerKind.learned, model=str(model)), tmp_path)


def code_and_french(count: int = 40) -> dict[str, list[Record]]:
    sentence = "Les enfants regardent la neige qui tombe lentement sur le village, puis ils rentrent chez eux {}."
    line = "for {0} in range({1}):\n    if table[{0}] is None:\n        raise KeyError({0})\n"
    texts = {
        "french": [" ".join(sentence.format(n * m) for m in range(4)) for n in range(count)],
        "code": ["\n".join(line.format("abcdefgh"[m % 8], n) for m in range(4)) for n in range(count)],
    }
    return {name: [Record(str(n), name, "s", text, 0) for n, text in enumerate(mine)] for name, mine in texts.items()}


def test_text_of_another_kind_is_reported(tmp_path):
    """Control: no warning for other problems of the same kind."""
    directory = fitted(problems(4, 240), tmp_path).directory
    for name, records in {**code_and_french(), "the same": problems(5, 40)}.items():
        reports: list[str] = []
        stored = LearnedScorer(ScorerConfig(ScorerKind.learned, model=str(directory)), tmp_path)
        stored.report = reports.append
        if name == "code":
            stored.fit(lambda records=records: records[:10])
            assert len(reports) == 1, "before the first score"
        stored.score(records[:15])
        assert len(reports) == (name == "code"), "too few to judge by"
        stored.score(records)
        stored.score(records)
        assert len(reports) == (name != "the same"), (name, reports)
        assert all("learned from other text" in one and "%" in one for one in reports)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            lambda n: None,
            "needs 30 labels or more: 240 different records passed the screen, 0 of them labelled; try label_key=COLUMN",
        ),
        (
            lambda n: n if n < 20 else None,
            "240 different records passed the screen, 20 of them labelled; try scorer.labeler",
        ),
        (lambda n: 3, "all 240 labels are 3: there is nothing to learn"),
    ],
)
def test_labels_that_teach_nothing_are_rejected(tmp_path, labels, message):
    records = relabelled(problems(4, 240), map(labels, range(240)))
    with pytest.raises(ConfigError, match=message):
        fitted(records, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("has_grader", [False, True])
def test_thirty_different_texts_are_enough_and_29_are_not(tmp_path, has_grader):
    """A grade of 0 is a grade. A copy of a text teaches nothing."""
    for count in (30, 29):
        records = [replace(one, label=n % 7 if n < count else None) for n, one in enumerate(problems(4, 60))]
        records.append(replace(records[0], id="copy", text=records[0].text.upper()))
        answers = {record.id: record.label for record in records}
        labeler = (
            grader(answer=lambda one, a=answers: np.nan if a[one.id] is None else a[one.id]) if has_grader else None
        )
        if count == 30:
            model = fitted(records, tmp_path / "a", labeler, labels=60).model
            assert model is not None and model.facts["labels"] == 30 and model.facts["label_range"] == [0, 6]
        else:
            with pytest.raises(DataError if has_grader else ConfigError, match="29"):
                fitted(records, tmp_path / "b", labeler, labels=60)


def test_the_output_of_a_filter_holds_one_scorer(tmp_path):
    for name in ("a", "b"):
        assert stored_in(tmp_path) == (tmp_path if name == "a" else tmp_path / "stages" / "learned-a")
        folder = tmp_path / "stages" / f"learned-{name}"
        folder.mkdir(parents=True)
        (folder / linear.FACTS).touch()
        assert stored_in(folder) == folder
    with pytest.raises(ConfigError, match=r"^model=.*holds several learned scorers.*learned-a or .*learned-b"):
        stored_in(tmp_path)


def test_labels_that_only_tell_domains_apart_are_rejected(tmp_path):
    records = problems(4, 240)
    names = sorted({record.domain for record in records})
    with pytest.raises(ConfigError, match=r"differ between domains only.*omit domain_key"):
        fitted(relabelled(records, [names.index(record.domain) for record in records]), tmp_path)


def test_one_of_several_copies_is_learned_from(tmp_path):
    """Where exact duplicates stay: the filter gives the one that it keeps the mean of their labels."""
    records = list(problems(4, 240))
    copies = [replace(one, id="copy", text=one.text.upper(), domain=one.domain) for one in records[:7]]
    bare = [replace(one, label=None) for one in records[:7]]
    scorer = fitted([*bare, *records, *copies, *records[:7]], tmp_path)
    assert scorer.model and scorer.model.facts["labels"] == 240


@pytest.mark.parametrize(
    "scale", ["skewed", *(pytest.param(one, marks=pytest.mark.slow) for one in ("binary", "tiny"))]
)
def test_labels_of_any_scale_are_learned(tmp_path, scale):
    records = problems(4, 240)
    change = {"binary": lambda y: y > 4, "skewed": lambda y: np.exp(3 * y), "tiny": lambda y: y * 1e-9 - 5}[scale]
    given = relabelled(records, np.asarray(change(labels_of(records)), np.float64))
    assert area(fitted(given, tmp_path).score(given), records) > 0.8


def test_labels_are_drawn_from_each_domain():
    counts = Counter({"large": 10_000, "small": 100, "tiny": 3})
    quotas = quotas_of(dict(counts), counts, 100)
    assert sum(quotas.values()) == 100 and quotas["tiny"] == 3 and quotas["small"] > 15 and quotas["large"] > 50
    assert quotas_of(dict(counts), counts, 20_000) == dict(counts), "all, where there are fewer"
    for number in range(1, 60):
        equal = Counter({f"{one:02}": 500 for one in range(number)})
        quotas = list(quotas_of(dict(equal), equal, 500).values())
        assert sum(quotas) == 500 and max(quotas) - min(quotas) <= 1


def test_the_sample_does_not_depend_on_the_order_of_records(tmp_path):
    records = [replace(one, domain="all", label=None) for one in problems(4, 240)]
    one, other = grader(), grader()
    fitted(records, tmp_path / "a", one, labels=60)
    fitted(records[::-1], tmp_path / "b", other, labels=60)
    assert set(one.asked) == set(other.asked)


def test_statistics_are_of_the_corpus_and_scales_of_each_model(tmp_path):
    """Not those of the labelled records. Control: the statistics of these differ."""
    records = [replace(one, label=one.label if place < 80 else None) for place, one in enumerate(problems(4, 240))]
    model = fitted(records, tmp_path).model
    assert model is not None
    found, whole, part = (model.weighting, *(linear.Weighting.fitted([some]) for some in (records, records[:80])))
    for name in ("idf_C", "familiar_C", "figures_2K"):
        assert np.allclose(getattr(found, name), getattr(whole, name), atol=1e-5)
        assert not np.allclose(getattr(found, name), getattr(part, name), atol=1e-3)
    for number in range(linear.FOLDS + 1):
        scores = model.predict(model.weighting.vectors(records), np.full(len(records), number))
        assert abs(scores.mean()) < 1e-4 and abs(scores.std() - 1) < 1e-4


# -- planted bugs


def own_model(model: linear.LinearModel, records: Any) -> np.ndarray:
    return np.full(len(records), linear.FOLDS)


def by_id(record: Record) -> int:
    return int(sha256_text(record.id)[:16], 16)


def unscaled(records: Any) -> Any:
    found = features_of(records)
    return replace(found, figures_NF=np.roll(found.figures_NF, 1, axis=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "bug", "check"),
    [
        (linear.LinearModel, "models_of", own_model, test_no_record_is_scored_by_a_model_that_learned_from_it),
        (linear, "identity", by_id, test_no_record_is_scored_by_a_model_that_learned_from_it),
        (linear.LinearModel, "models_of", own_model, test_a_label_changes_only_the_scores_of_other_folds),
        (linear, "features_of", unscaled, test_a_stored_scorer_scores_the_same_to_the_bit),
        (linear, "_targets", lambda labels, domains: labels - labels.mean(), test_labels_of_any_scale_are_learned),
        (learned, "FAR", 0.0, test_text_of_another_kind_is_reported),
    ],
)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, owner, name, bug, check):
    monkeypatch.setattr(owner, name, bug)
    more = ("skewed",) if check is test_labels_of_any_scale_are_learned else ()
    with pytest.raises(AssertionError):
        check(tmp_path, *more)


# -- graders


def grader(**more: Any) -> Any:
    known = {record.content: record.label for record in problems(4, 240)}
    asked: list[str] = []

    def grade(record: Record) -> float:
        asked.append(record.id)
        return more["answer"](record) if "answer" in more else known[record.content]

    found = FixedScorer(grade, "grader")
    found.asked = asked  # type: ignore[attr-defined]
    return found


def test_another_grader_is_another_scorer(tmp_path):
    config, other = ScorerConfig(ScorerKind.learned), grader()
    other.fingerprint = "another"
    one, same, two = (LearnedScorer(config, tmp_path, labeler) for labeler in (grader(), grader(), other))
    assert one.fingerprint == same.fingerprint != two.fingerprint and one.directory != two.directory


def test_grades_keep_the_direction_of_their_grader(tmp_path):
    labeler = grader()
    labeler.direction = Direction.quality
    scorer = fitted(problems(4, 240), tmp_path, labeler, labels=60)
    stored = LearnedScorer(ScorerConfig(ScorerKind.learned, model=str(scorer.directory)), tmp_path)
    assert scorer.direction is stored.direction is Direction.quality


def test_a_grader_labels_a_sample_and_its_grades_are_stored(tmp_path):
    records = relabelled(problems(4, 240), [None] * 240)
    reports: list[str] = []
    labeler = grader()
    scorer = fitted(records, tmp_path, labeler, reports, labels=100)
    assert len(labeler.asked) == len(set(labeler.asked)) == 100 and reports[0] == "fixed grades 100 records"
    assert area(scorer.score(records), problems(4, 240)) > 0.75
    again = grader()
    resumed = fitted(records, tmp_path, again, labels=100)
    assert not again.asked, "a stored scorer asks for nothing"
    for one in (scorer, resumed):
        others = one.score_all(records)[1]
        assert one.others == ("fold", "label") and np.isfinite(others["label"]).sum() == 100
        graded = np.isfinite(others["label"])
        assert (others["label"][graded] == labels_of(problems(4, 240))[graded]).all()


def test_records_that_a_grader_cannot_grade_are_replaced(tmp_path):
    records = problems(4, 240)
    refused = {record.id for record in records if int(record.id) % 5 == 0}
    labeler = grader(answer=lambda one: np.nan if one.id in refused else one.label)
    scorer = fitted(records, tmp_path / "a", labeler, labels=100)
    assert scorer.model and scorer.model.facts["labels"] == 100 and len(set(labeler.asked)) == len(labeler.asked) > 100
    counts = Counter(record.domain for record in records)
    assert scorer.model.facts["labels_by_domain"] == quotas_of(dict(counts), counts, 100), "by others of their domain"
    reports: list[str] = []
    lazy = grader(answer=lambda one: one.label if int(one.id) % 2 else np.nan)
    fitted(records, tmp_path / "b", lazy, reports, labels=100)
    assert len(lazy.asked) <= 152 and any("graded only" in one for one in reports)
    with pytest.raises(DataError, match=r"graded 0 records.*needs 30"):
        fitted(records, tmp_path / "c", grader(answer=lambda one: np.nan), labels=100)
    with pytest.raises(ConfigError, match=r"^scorer.labeler: all 100 labels are 3: "):
        fitted(records, tmp_path / "d", grader(answer=lambda one: 3.0), labels=100)


def test_the_cost_of_a_judge_is_said_before_it_is_asked(tmp_path, server):
    """A judge that fails half-way is not asked again about what it answered."""
    from data.filter.score.judge import JudgeScorer
    from tests.support.fakes.llm_server import Pauses, graded

    records = relabelled(problems(4, 240), [None] * 240)
    settings: dict[str, Any] = {"url": server.url, "judge": "grader", "key_variable": "JUDGE_KEY", "retries": 0}

    def made() -> JudgeScorer:
        return JudgeScorer(ScorerConfig(ScorerKind.judge, **settings), Pauses())

    replies = iter(range(1000))
    server.reply = lambda body, turn: graded(1 + len(str(body)) % 5) if next(replies) < 25 else (503, {}, b"")
    reports: list[str] = []
    with pytest.raises(LeviathanError, match="does not answer"):
        fitted(records, tmp_path, made(), reports, labels=40)
    assert reports[0].startswith("40 requests to grader, about") and "0 answers are in" in reports[0]
    answered = 25
    server.requests.clear()
    server.reply = lambda body, turn: graded(1 + len(str(body)) % 5)
    fitted(records, tmp_path, made(), reports, labels=40)
    assert f"{answered} answers are in" in reports[1] and len(server.requests) == 40 - answered


# -- in the filter


def write_problems(path: Path, count: int = 100, **more: Any) -> Path:
    return write_lines(
        path,
        [
            {"q": one.prompt, "a": one.response, "kind": one.family, "level": one.label, **more}
            for one in make_problems(count, 6)
        ],
    )


KEYS = {"prompt_key": "q", "response_key": "a", "domain_key": "kind"}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_filter_is_the_same_on_any_number_of_processes(tmp_path, small_shards, count):
    """One process learns, and the others read what it stored. A second run reads it too."""
    source = write_problems(tmp_path / "in.jsonl")

    def run(out: Path, workers: Any) -> None:
        rules = {
            "scorer": LearnedScorer(ScorerConfig(ScorerKind.learned), out / "stages"),
            "label_key": "level",
            **KEYS,
        }
        done = Filter(job(source, out, workers, **rules))
        done.run()
        if workers.rank == 0:
            write_outputs(done, out)

    run(tmp_path / "1", OneWorker())
    on_threads(count, lambda worker: run(tmp_path / str(count), worker))
    assert outputs(tmp_path / str(count)) == outputs(tmp_path / "1")


class FoldedScorer(FixedScorer):
    """Perfect inside each of two folds, which have different levels."""

    others = ("fold",)

    def score_all(self, records: Any) -> Any:
        folds = np.array([int(record.content[:8], 16) % 2 for record in records], np.float64)
        return labels_of(records) - 100 * folds, {name: folds for name in self.others}

    def score(self, records: Any) -> Any:
        return self.score_all(records)[0]


@pytest.mark.parametrize("is_told", [True, False])
def test_only_records_of_one_fold_are_compared(tmp_path, is_told, monkeypatch):
    """Control: without the column of folds all pairs count."""
    monkeypatch.setattr(FoldedScorer, "others", ("fold",) if is_told else ())
    source = write_problems(tmp_path / "in.jsonl")
    found = filtered(source, tmp_path / "out", FoldedScorer(None), label_key="level", **KEYS).proof
    assert found and [one["name"] for one in found["scorers"]].count("fold") == 0
    first = found["scorers"][0]
    assert (first["auc"] == 1 and first["correlation"] > 0.99) if is_told else first["auc"] < 0.9


@pytest.mark.parametrize("has_prompts", [True, False])
def test_high_labels_are_better_documents_or_harder_prompts(tmp_path, has_prompts):
    """A rerun, which does not learn again, says the same."""
    rows = [json.loads(line) for line in write_problems(tmp_path / "raw.jsonl", 60).read_text().splitlines()]
    source = write_lines(tmp_path / "in.jsonl", [{**row, "text": row["q"] + row["a"]} for row in rows])
    keys = KEYS if has_prompts else {"domain_key": "kind"}
    for _ in range(2):
        scorer = LearnedScorer(ScorerConfig(ScorerKind.learned), tmp_path / "out" / "stages")
        filtered(source, tmp_path / "out", scorer, label_key="level", **keys)
        assert scorer.direction is (Direction.hard if has_prompts else Direction.quality)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_learned_member_of_an_ensemble_is_fitted_once(tmp_path, monkeypatch, is_told):
    """Control: two processes learn, if nobody tells that the ensemble has a member that stores what it learned."""
    if not is_told:
        monkeypatch.setattr(pipeline, "stored_parts", lambda scorer: [])
    source, times, real = write_problems(tmp_path / "in.jsonl", 60), [], learned.learn
    both = threading.Barrier(2, timeout=60)

    def learn(*arguments: Any) -> Any:
        times.append(1)
        if not is_told:
            both.wait()
        return real(*arguments)

    monkeypatch.setattr(learned, "learn", learn)

    def run(worker: Any) -> None:
        scorer = LearnedScorer(ScorerConfig(ScorerKind.learned), tmp_path / "out" / "stages", grader_of_length())
        scorer.report = lambda line: None
        done = Filter(job(source, tmp_path / "out", worker, EnsembleScorer([scorer, LengthScorer()]), **KEYS))
        done.run()
        if worker.rank == 0:
            assert done.proof and done.proof["labels"]["source"] == "scorer", "labels of the member's grader"

    on_threads(2, run)
    assert len(times) == (1 if is_told else 2)


def grader_of_length() -> FixedScorer:
    return FixedScorer(lambda record: len(record.text))


def test_labels_of_copies_count_for_the_record_that_is_kept(tmp_path):
    """The first copy has no label, others contradict each other."""
    rows = [json.loads(line) for line in write_problems(tmp_path / "in.jsonl", 60).read_text().splitlines()]
    bare = [{key: value for key, value in row.items() if key != "level"} for row in rows]
    source = write_lines(tmp_path / "all.jsonl", [*bare, *rows, {**rows[0], "level": rows[0]["level"] + 2}])
    done = filtered(source, tmp_path / "out", FixedScorer(lambda one: 0.0), label_key="level", **KEYS)
    labels = {record.text: record.label for record in done.passed()}
    passed = [row for row in rows if f"{row['q']}\n\n{row['a']}" in labels]
    assert len(passed) > 50
    wanted = [row["level"] + (row is rows[0]) for row in passed]
    assert [labels[f"{row['q']}\n\n{row['a']}"] for row in passed] == wanted


# -- configuration


def test_new_settings_leave_old_hashes_as_they_were():
    import core.config

    for scorer in (ScorerConfig(), ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(), ScorerConfig(order=3)])):
        rules = FilterRules(scorer=scorer)
        for settings in (decisive_settings(rules), without_defaults(core.config.plain(rules))):
            assert "labels" not in str(settings) and "labeler" not in str(settings)
    judge = ScorerConfig(ScorerKind.judge, url="http://a", judge="m")
    rules = FilterRules(scorer=ScorerConfig(ScorerKind.learned, labels=100, labeler=judge))
    found = decisive_settings(rules)["scorer"]
    assert found["labels"] == 100 and found["labeler"]["judge"] == "m" and "url" not in found["labeler"]


def test_impossible_settings_are_rejected():
    judge = ScorerConfig(ScorerKind.judge, url="http://a", judge="m")
    for settings, message in (
        ({"labels": 10}, "labels=10: must lie in"),
        ({"kind": ScorerKind.ngram, "labeler": judge}, "labeler: has no effect on a scorer other than learned"),
        ({"model": "m", "labeler": judge}, "labeler: has no effect on a stored scorer"),
        ({"labeler": ScorerConfig()}, "labeler.kind=ngram: cannot grade a sample alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            ScorerConfig(**{"kind": ScorerKind.learned, **settings})


def test_models_of_labelers_and_members_are_checked():
    loss = ScorerConfig(ScorerKind.loss, model="m")
    check = Mock(return_value="perhaps")
    for config, key in (
        (ScorerConfig(ScorerKind.learned, labeler=loss), "scorer.labeler.model"),
        (ScorerConfig(ScorerKind.learned, model="d", reference="m", features=FeatureKind.hidden), "scorer.reference"),
        (ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(), loss]), "scorer.members[1].model"),
    ):
        reports: list[str] = []
        check_models(Models(Mock(), check, Mock()), config, lambda: [], reports.append)
        assert reports == [f"warning: {key}: perhaps"]
        seen = Mock(side_effect=ConfigError("", "m", "was trained on them"))
        with pytest.raises(ConfigError, match="was trained on them") as caught:
            check_models(Models(Mock(), seen, Mock()), config, lambda: [], pytest.fail)
        assert caught.value.key == key
    config = ScorerConfig(ScorerKind.excess, model="m", reference="r")
    check_models(Models(Mock(), check, Mock()), config, lambda: [], reports.append)
    assert reports[1:] == ["warning: scorer.model: perhaps", "warning: scorer.reference: perhaps"]
    check_models(Models(Mock(), Mock(return_value=None), Mock()), config, lambda: [], pytest.fail)
