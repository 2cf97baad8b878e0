"""Scores are held against labels: the figures are right, weak scorers are named or refused, and bad labels are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from core.errors import ConfigError
from data.filter.audit import proof as module
from data.filter.audit.findings import conclusion
from data.filter.audit.outputs import audit_of
from data.filter.audit.plots import draw
from data.filter.audit.proof import hard_or_easy, sentence, verdict
from data.filter.audit.separation import auc, estimate, rank_correlation
from data.filter.config import BucketRule, DuplicateConfig, SelectConfig
from data.filter.pipeline import Filter
from launch.cli import main
from tests.data.filter.threads import on_threads
from tests.support.filtering import FixedScorer, job, kept, outputs, prose, rows_of, write_lines, write_outputs

CHANCE = np.random.default_rng
TEXTS = [row["text"] for row in prose(240)]
ANSWERS = [row["text"] for row in prose(240, 1)]
LABELS = CHANCE(0).integers(1, 6, 240).astype(float)
NOISE = CHANCE(4).normal(0, 1, 240)
PAIRS = {"prompt_key": "q", "response_key": "a", "label_key": "level", "domain_key": "domain"}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLES", 100)


def rows(labels: Any = LABELS, domains: Any = None) -> list[dict[str, Any]]:
    """Return pairs of prompt and answer, alternately of two domains."""
    domains = domains or ["algebra", "number theory"] * 120
    return [
        {"q": q, "a": a, "level": None if np.isnan(label) else float(label), "domain": domain}
        for q, a, label, domain in zip(TEXTS, ANSWERS, labels, domains, strict=True)
    ]


def run(folder: Path, scores: Any, labels: Any = LABELS, **settings: Any) -> Filter:
    """Filter the pairs with given scores."""
    given = settings.pop("rows", None) or rows(labels, settings.pop("domains", None))
    source = write_lines(folder / "in.jsonl", given)
    scorer = FixedScorer(lambda record: scores[int(record.id.split(":")[1]) - 1], str(np.sum(scores)))
    scorer.name = settings.pop("name", "fixed")
    keys = {**PAIRS, **settings.pop("keys", {})}
    settings = {"duplicates": DuplicateConfig(near=None), **settings}
    done = Filter(job(source, folder / settings.pop("out", "out"), scorer=scorer, **keys, **settings))
    done.run()
    return done


def proof_of(folder: Path, scores: Any, labels: Any = LABELS, **settings: Any) -> dict[str, Any]:
    return audit_of(run(folder, scores, labels, **settings), "in.jsonl")["proof"]


def texts_of(audit: dict[str, Any], kind: str) -> list[str]:
    return [one["text"] for one in audit["warnings"] if one["kind"] == kind]


def test_figures_of_one_bucket_are_those_of_sklearn_and_scipy():
    score, label = np.round(CHANCE(0).normal(0, 1, 90) + LABELS[:90] / 3, 1), LABELS[:90]
    whole = np.zeros(90, np.int64)
    binary = (label > 3).astype(float)
    found = auc({"a": score, "b": -score}, binary, whole, 100)
    assert found["a"].value == pytest.approx(roc_auc_score(binary, score))
    assert (
        found["b"].value == pytest.approx(1 - found["a"].value) and found["a"].low < found["a"].value < found["a"].high
    )
    ranks = rank_correlation({"a": score}, label, whole, 100)["a"]
    assert ranks.value == pytest.approx(spearmanr(score, label).statistic) and ranks.low < ranks.value < ranks.high
    assert np.isnan(rank_correlation({"": score}, label * 0, whole, 10)[""].value)
    unscored = CHANCE(1).random(90) < 0.4
    with_missing = auc({"": np.where(unscored, np.nan, score)}, binary, whole, 0)[""].value
    higher = score[:, None] > score
    won = np.where(unscored[:, None] | unscored | (score[:, None] == score), 0.5, higher)
    assert with_missing == pytest.approx(won[binary == 1][:, binary == 0].mean()), "records without a score tie"


def test_knowing_the_bucket_alone_is_chance():
    """Both the score and the label rise from bucket to bucket, and inside a bucket they have nothing in common."""
    bucket = np.repeat(np.arange(8), 60)
    label, score = (bucket + CHANCE(seed).normal(0, 1, 480) for seed in (0, 1))
    hard = (label > np.median(label)).astype(float)
    inside, overall = (auc({"": score}, hard, buckets, 200)[""] for buckets in (bucket, bucket * 0))
    assert inside.low < 0.5 < inside.high and overall.low > 0.8
    inside, overall = (rank_correlation({"": score}, label, buckets, 200)[""] for buckets in (bucket, bucket * 0))
    assert inside.low < 0 < inside.high and overall.low > 0.8


def test_intervals_cover_the_truth_in_19_of_20_cases():
    """Normal scores that differ by 0.5 standard deviations have an AUC of 0.638 (Bamber 1975)."""
    of_known = estimate(np.array([7.0, *range(1001)]))
    assert (of_known.value, of_known.low, of_known.high) == (7, 25, 975)
    hits, narrow = 0, 0
    hard, bucket = np.tile([0.0, 1.0], 60), np.repeat(np.arange(4), 30)
    for seed in range(80):
        found = auc({"": CHANCE(seed).normal(0, 1, 120) + hard / 2}, hard, bucket, 200, seed)[""]
        hits += found.low < 0.638 < found.high
        narrow += abs(found.value - 0.638) < (found.high - found.low) / 8
    assert 71 <= hits <= 80 and narrow < 50, "control: intervals of a quarter of the width miss"


@pytest.mark.parametrize(
    ("labels", "easy", "hard"),
    [
        ([1, 2, 3, 4, 5], {1, 2}, {4, 5}),
        ([0, 1], {0}, {1}),
        ([0] * 9 + [1], {0}, {1}),
        ([0] * 60 + [1] * 15 + [2] * 10 + [3] * 8 + [4] * 7, {0}, {1, 2, 3, 4}),
        ([1] + [2] * 18 + [3], {1}, {3}),
        (range(10), {0, 1, 2, 3}, {6, 7, 8, 9}),
        ([7, 7, 7], set(), set()),
        ([], set(), set()),
    ],
)
def test_the_upper_two_fifths_are_hard(labels, easy, hard):
    labels = np.array(labels, float)
    found = hard_or_easy(labels)
    assert (set(labels[found == 0]), set(labels[found == 1])) == (easy, hard)


def expected(done: Filter, score: Any) -> float:
    """Compute the AUC by hand from scores.parquet and the input."""
    table = rows_of(done)
    won, pairs = 0.0, 0
    for domain in {row["domain"] for row in table}:
        mine = np.array([n for n, row in enumerate(table) if row["domain"] == domain])
        split = hard_or_easy(LABELS[mine])
        size = np.array([len(ANSWERS[n].encode()) for n in mine])
        bucket = np.searchsorted(np.quantile(size, np.arange(1, 8) / 8), size, "left")
        for place in range(8):
            one, other = (score[mine[(bucket == place) & (split == side)]] for side in (1, 0))
            won += float((one[:, None] > other).sum() + (one[:, None] == other).sum() / 2)
            pairs += len(one) * len(other)
    return won / pairs


BUGS = {
    "inverted": lambda patch: patch.setattr(module, "hard_or_easy", lambda label: 1 - hard_or_easy(label)),
    "without buckets": lambda patch: patch.setattr(module, "length_buckets", lambda lengths, count: lengths * 0),
    "labels of the next row": lambda patch: patch.setattr(Filter, "labels", lambda done, shard: np.roll(LABELS, 1)),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_the_figures_of_a_filter_are_those_by_hand(tmp_path, monkeypatch, bug):
    if bug is not None:
        BUGS[bug](monkeypatch)
    score = np.array([len(answer) / 40 for answer in ANSWERS]) + LABELS + 3 * NOISE
    done = run(tmp_path, score)
    write_outputs(done, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())["proof"]
    is_right = found["scorers"][0]["auc"] == pytest.approx(expected(done, score), abs=1e-6)
    assert is_right == (bug is None)
    if bug is None:
        names = ["fixed", "length of the answer", "length of the prompt", "random"]
        assert [one["name"] for one in found["scorers"]] == names
        first, *lengths, _ = (one["auc"] for one in found["scorers"])
        leads = {one["over"]: one["auc"] for one in found["lead"]}
        assert leads == pytest.approx(dict(zip(names[1:3], first - np.array(lengths), strict=True)), abs=1e-5)
        assert [row["label"] for row in rows_of(done)] == LABELS.tolist()
        level = {one["from"]: one["kept"] for one in found["kept"]}
        assert level[2.0] == pytest.approx(np.mean([r["kept"] for r in rows_of(done) if r["label"] == 2]), abs=1e-6)


def test_a_score_is_proven_if_it_beats_chance_and_length(tmp_path):
    length = np.array([len(text) for text in TEXTS], float)
    cases = {
        "proven": (LABELS + NOISE, LABELS),
        "chance": (NOISE, LABELS),
        "length": (length, length),  # a label that follows the length of the prompt
        "unknown": (LABELS, np.where(np.arange(240) < 3, LABELS, np.nan)),
    }
    for name, (score, label) in cases.items():
        (tmp_path / name).mkdir()
        audit = audit_of(run(tmp_path / name, score, label), "in.jsonl")
        assert verdict(audit["proof"]) == name
        warnings, lines = texts_of(audit, "not_proven"), list(conclusion(audit))
        assert len(warnings) == (name != "proven") and ("The score tells hard from easy" in lines[0]) == (
            name == "proven"
        )
        for line in (*warnings, *lines):
            assert "\n" not in line
    assert "It is unknown" in warnings[0] and "a few hundred labels are needed" in warnings[0]


def figures(auc: float, half: float, lead: float = 0.3, **more: Any) -> dict[str, Any]:
    """Return a proof with an AUC and the lead over the length of the answer, each plus or minus `half`."""
    first, of_lead = ({"auc": one, "low": one - half, "high": one + half} for one in (auc, lead))
    labels = {"records": 100, "sample": 100, "hard": 40, "easy": 40, "buckets": 8, "source": "input"}
    labels["learned"] = 100
    scorers = [{"name": "judge", "correlation": 0.1, **first}, {"name": "random", **first}]
    given = {"scorer": "judge", "direction": "hard", "prompts": True, "scorers": scorers, "domains": {}}
    return given | {"labels": labels, "lead": [{"over": "length of the answer", **of_lead}]} | more


LEARN = "let scorer.kind=learned learn from labels"
OWN = {"scorer": "learned"}
ADVICE = [
    (figures(0.55, 0.1), None, f"{LEARN}; about 400 labels would show it"),
    (figures(0.7, 0.1, lead=0.05), None, f"{LEARN}; about 400 labels would show it"),
    (figures(0.45, 0.1), None, LEARN),
    (figures(0.7, 0.1), 0.65, f"{LEARN}; about 400 labels would show it"),
    (figures(0.7, 0.1), 0.99, LEARN),
    (figures(0.6, 0.0999), None, LEARN),
    (figures(0.36, 0.1), None, f"check that higher labels mean harder, or {LEARN}"),
    (figures(0.36, 0.1, prompts=False), None, f"check that higher labels mean better, or {LEARN}"),
    (figures(0.45, 0.1, **OWN), None, "label more records of this input and learn from them"),
    (figures(0.45, 0.1, **OWN, labels=figures(0, 0)["labels"] | {"source": "scorer"}), None, "raise scorer.labels"),
    (
        figures(0.45, 0.1, **OWN, labels=figures(0, 0)["labels"] | {"learned": 50}),
        None,
        "learn from all labels (scorer.labels=100)",
    ),
    (
        figures(0.7, 0.1, lead=0.05, domains={"a": {"length": {"auc": 0.7, "low": 0.6, "high": 0.8}}}),
        None,
        "the labels say that length is difficulty: try select.buckets=auto",
    ),
    (figures(0.51, 0.1), None, LEARN),
    (
        figures(0.45, 0.1, direction="learnable"),
        None,
        f"high scores mean learnable text, which is often easier; {LEARN}",
    ),
]


@pytest.mark.parametrize(("proof", "bar", "advice"), ADVICE)
def test_the_advice_fits_the_figures(proof, bar, advice):
    assert module.advice(proof, bar) == advice
    text = next(module.shortcoming(proof), "")
    assert ("the wrong way round" in text) == (proof["scorers"][0]["high"] < 0.5) and "random" not in text


@pytest.mark.parametrize(
    ("leads", "expected"), [((0.3, 0.3), "proven"), ((0.3, 0.05), "length"), ((0.05, 0.3), "length")]
)
def test_a_score_must_beat_both_lengths(leads, expected):
    proof = figures(0.7, 0.1)
    proof["lead"] = [figures(0.7, 0.1, lead=lead)["lead"][0] for lead in leads]
    assert verdict(proof) == expected


def test_only_a_learned_score_needs_figures_for_its_buckets():
    def never() -> None:
        raise AssertionError("computed for nothing")

    rules = SelectConfig(buckets=BucketRule.auto)
    assert module.by_length(rules, "ngram", never, ["a", "b"]) == [True, True]
    with pytest.raises(AssertionError, match="for nothing"):
        module.by_length(rules, "learned", never, ["a", "b"])


def test_copies_compete_with_the_mean_of_their_labels(tmp_path):
    copied = [*rows()[:239], {**rows()[0], "level": LABELS[0] + 8.5}]
    proof = audit_of(run(tmp_path, NOISE, rows=copied), "in.jsonl")["proof"]
    assert proof["labels"]["distinct"] == len(set(LABELS)) + 1
    assert proof["labels"]["contradictory"] == 2


def test_an_auc_is_required_of_its_lower_bound():
    proof = figures(0.7, 0.1)
    module.check_auc(SelectConfig(require_auc=proof["scorers"][0]["low"]), lambda: proof)
    with pytest.raises(ConfigError, match=r"lower bound for judge: AUC 0.70 .* in 8 buckets .* about 400 labels would"):
        module.check_auc(SelectConfig(require_auc=0.65), lambda: proof)


def test_length_says_little_inside_buckets(tmp_path, monkeypatch):
    """Labels follow the length, and 60 records of each domain are labelled. With buckets of 20 length is left."""
    size = np.array([len(answer) for answer in ANSWERS], float)
    labels = np.where(np.arange(240) < 120, size + 30 * NOISE, np.nan)
    areas = []
    for least in (8, 20):
        monkeypatch.setattr(module, "_IN_BUCKET", least)
        found = proof_of(tmp_path, NOISE, labels, out=f"{least}")
        assert found["labels"]["buckets"] == 2 * (60 // least)
        areas.append({one["name"]: one["auc"] for one in found["scorers"]}["length of the answer"])
    assert areas[0] < 0.62 < 0.66 < areas[1]


def test_labels_are_a_random_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", 60)
    assert proof_of(tmp_path, NOISE, np.where(np.arange(240) < 120, 1.0, LABELS))["labels"]["distinct"] > 1


BAD_LABELS: dict[str, dict[str, Any]] = {
    "": {},
    "are equal": {"labels": np.full(240, 3.0)},
    "No record is labelled in number theory": {"labels": np.where(np.arange(240) % 2 == 0, LABELS, np.nan)},
    "2 records with equal texts have different labels": {"rows": [*rows()[:239], {**rows()[0], "level": 9.0}]},
    "follow the length of the scored text": {"labels": np.array([float(len(answer)) for answer in ANSWERS])},
}


@pytest.mark.parametrize("text", BAD_LABELS)
def test_bad_labels_are_said(tmp_path, text):
    audit = audit_of(run(tmp_path, NOISE, **BAD_LABELS[text]), "in.jsonl")
    assert [text in warning for warning in texts_of(audit, "labels")] == [True] * bool(text)
    records = {
        "No record": 120,
        "2 records": 239,
    }  # of a record that is dropped before scoring, the label does not count
    assert audit["proof"]["labels"]["records"] == next((n for name, n in records.items() if text.startswith(name)), 240)


def test_another_scale_in_each_domain_changes_nothing(tmp_path):
    (tmp_path / "scaled").mkdir()
    found = [
        proof_of(folder, LABELS + NOISE, labels)["scorers"][0]
        for folder, labels in ((tmp_path, LABELS), (tmp_path / "scaled", LABELS * np.tile([1, 100], 120)))
    ]
    assert found[0] == found[1]


def test_labels_of_the_scorers_grader_are_used(tmp_path, monkeypatch):
    """A scorer with other scores that include `label`, as `learned` with a judge has."""

    class Learned(FixedScorer):
        others = ("label",)

        def score_all(self, records: Any) -> Any:
            rows = [int(record.id.split(":")[1]) - 1 for record in records]
            return self.score(records), {"label": np.where(LABELS[rows] < 3, np.nan, LABELS[rows])}

    monkeypatch.setattr("tests.data.filter.audit.test_proof.FixedScorer", Learned)
    found = proof_of(tmp_path, LABELS + NOISE, keys={"label_key": None})
    assert found["labels"]["source"] == "scorer" and found["labels"]["records"] == (LABELS >= 3).sum()
    assert [one["name"] for one in found["scorers"]][:2] == ["fixed", "length of the answer"]
    assert verdict(found) == "proven"


def test_one_label_is_one_level(tmp_path):
    audit = audit_of(run(tmp_path, NOISE, np.where(LABELS == 2, 2.0, np.nan)), "in.jsonl")
    share, count = audit["proof"]["kept"][0]["kept"], (LABELS == 2).sum()
    assert list(conclusion(audit)) == [f"kept {100 * share:.0f}% of level 2"]
    assert f"All labels ({count}) are equal, so no scorer can be held against them." in texts_of(audit, "labels")
    assert texts_of(audit, "not_proven")[0].endswith("; labels that differ are needed.") and "proof" not in draw(audit)


def test_documents_and_quintiles(tmp_path):
    """Documents have one length and no difficulty, and many labels are shown by fifths."""
    keys = {"prompt_key": None, "response_key": None, "text_key": "q"}
    audit = audit_of(run(tmp_path, NOISE + LABELS, LABELS + NOISE / 9, keys=keys), "in.jsonl")
    assert "high labels from low ones" in next(conclusion(audit)) and "hard" not in sentence(audit["proof"])
    shares = [one["kept"] for one in audit["proof"]["kept"]]
    assert len(shares) == 5 and shares[0] < shares[2] < shares[4]
    assert sum(one["documents"] for one in audit["proof"]["kept"]) == 240


def test_a_required_auc_refuses_and_a_rerun_goes_on(tmp_path, capsys, no_page):
    """The command's exit code, its one line, what it leaves behind, and its last lines."""
    write_lines(tmp_path / "in.jsonl", rows())
    words = [f"{key}={value}" for key, value in PAIRS.items()] + [f"out={tmp_path / 'out'}", "unit=documents"]
    words += [f"input={tmp_path / 'in.jsonl'}", "scorer.kind=random"]
    assert main(["filter", *words, "select.require_auc=0.9"]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line]
    assert line.startswith(
        "leviathan: error: select.require_auc=0.9: not reached by the lower bound for random: AUC 0."
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stages"]
    assert main(["filter", *words, "select.require_auc=0.9", "scorer.kind=length"]) == 2, "another scorer"
    said = capsys.readouterr()
    assert "read" not in said.out and "screened" not in said.out and "scored" in said.out
    assert main(["filter", *words]) == 0, "a lower bar"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("kept 120 of 240 records"), "no stage was computed again"
    assert said[1].startswith("warning: The score is not shown to tell hard from easy here")
    assert said[2].startswith("kept ") and said[2].endswith("% of levels 1 to 5")
    assert main(["filter", *words, "select.require_auc=0.9"]) == 2, "a finished filter is checked again"
    assert main(["filter", *words, "label_key=null", "select.require_auc=0.9", f"out={tmp_path / 'none'}"]) == 2
    assert "no record has a label" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert main(["filter", *words, "label_key=null", "scorer.kind=ngram", f"out={tmp_path / 'none'}"]) == 0
    assert "Nothing shows that ngram tells hard from easy" in capsys.readouterr().out


def test_buckets_follow_the_labels_of_a_learned_scorer(tmp_path):
    """Long answers are hard in algebra. There, `auto` has no length buckets, on any number of processes."""
    size = np.array([len(answer) for answer in ANSWERS], float)
    labels = np.where(np.arange(240) % 2 == 0, size + 9 * NOISE, NOISE)
    score, said = labels + 5 * NOISE[::-1], list[str]()

    def buckets(rule: BucketRule, **settings: Any) -> dict[str, int]:
        out = f"{rule.name}{len(settings)}"
        done = run(tmp_path, score, labels, select=SelectConfig(buckets=rule), out=out, **settings)
        write_outputs(done, tmp_path / out)
        audit = json.loads((tmp_path / out / "audit.json").read_text())
        domains = audit["thresholds"]["domains"]
        said.extend(line for line in conclusion(audit) if "select.buckets" in line)
        assert audit["buckets"]["without_length"] == [n for n, one in domains.items() if len(one["buckets"]) == 1]
        return {name: len(one["buckets"]) for name, one in domains.items()}

    assert buckets(BucketRule.length) == {"algebra": 3, "number theory": 3}
    assert buckets(BucketRule.domain) == {"algebra": 1, "number theory": 1}
    assert buckets(BucketRule.auto) == {"algebra": 3, "number theory": 3}, "not a learned scorer"
    assert "since fixed did not learn from labels" in said[-1]
    assert buckets(BucketRule.auto, name="learned") == {"algebra": 1, "number theory": 3}
    assert said[-1].startswith(
        "select.buckets=auto: records compete across lengths in algebra; length buckets stay in "
    )
    assert len(said) == 2, "only auto is explained"
    chosen = kept(tmp_path / "auto1")
    assert chosen != kept(tmp_path / "length0") and kept(tmp_path / "auto0") == kept(tmp_path / "length0")

    def work(worker: Any) -> Filter:
        select = SelectConfig(buckets=BucketRule.auto)
        scorer = FixedScorer(lambda record: score[int(record.id.split(":")[1]) - 1])
        scorer.name = "learned"
        rules = {"select": select, "duplicates": DuplicateConfig(near=None)}
        done = Filter(job(tmp_path / "in.jsonl", tmp_path / "two", worker, scorer, **rules, **PAIRS))
        done.run()
        return done

    done = on_threads(2, work)[0]
    assert len({done._hash_of_scores(None, np.array(one)) for one in ([1, 1], [0, 1], [1, 0])}) == 3
    write_outputs(done, tmp_path / "two")
    assert kept(tmp_path / "two") == chosen and outputs(tmp_path / "two")["scores.parquet"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"low": 0.55}, "the lower bound of the AUC of length is not above 0.55"),
        ({"length": None}, "there are fewer than 40 hard and easy labels"),
        ({"prompts": False}, "records have no prompts"),
        ({"domain": "b"}, "no record is labelled"),
        ({"scorer": "ngram"}, "ngram did not learn from labels"),
    ],
)
def test_auto_needs_a_reason_to_compete_across_lengths(change, why):
    found = {"scorer": "learned", "prompts": True, "low": 0.551, "domain": "a"} | change
    domains = {"a": {"length": change.get("length", {"auc": 0.6, "low": found["low"]})}}
    proof = {"prompts": found["prompts"], "domains": domains}
    assert module.why_by_length(found["scorer"], proof, found["domain"]) == why
    rules = SelectConfig(buckets=BucketRule.auto)
    assert module.by_length(rules, found["scorer"], lambda: proof, [found["domain"]]) == [why != ""]


def test_rules_about_labels_are_checked():
    for bad in (0.3, 1.0):
        with pytest.raises(ConfigError, match=r"must lie in \[0.5, 1\)"):
            SelectConfig(require_auc=bad)


def test_few_labels_at_one_end_and_two_scales_are_said(tmp_path):
    for name in ("odd", "scales", "one"):
        (tmp_path / name).mkdir()
    label = np.r_[np.ones(239), 2.0]
    proof = proof_of(tmp_path / "odd", NOISE, label)
    assert verdict(proof) == "unknown"
    scales = np.where(np.arange(240) % 2, LABELS, 10_000 * (1 + LABELS))
    found = proof_of(tmp_path / "scales", NOISE, scales)["labels"]["scales"]
    assert found is not None and found[0] < 100 < found[1]
    assert proof_of(tmp_path / "one", NOISE)["labels"]["scales"] is None
