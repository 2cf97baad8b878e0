"""The whole filter: counts add up, and results are the same on any number of processes and after any kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError, DataError
from data.filter import pipeline, runs, store
from data.filter.audit.outputs import KEPT, SCORES, audit_of
from data.filter.config import (
    BucketRule,
    ContaminationConfig,
    DuplicateConfig,
    GateConfig,
    InputConfig,
    KeepUnit,
    OnError,
    SelectConfig,
)
from data.filter.input.readers import clean_records
from data.filter.input.records import Reason, Record
from data.filter.pipeline import THRESHOLDS, Filter
from data.filter.score.baselines import LengthScorer
from data.filter.store import barrier
from launch.filter.workers import WorldWorkers
from parallel.comm.world import connect
from tests.data.filter.threads import ThreadWorker, on_threads
from tests.support.filtering import (
    FixedScorer,
    filtered,
    job,
    kept,
    outputs,
    prose,
    rows_of,
    write_lines,
    write_outputs,
)


def several(folder: Path, seed: int = 0) -> Path:
    """Write three files with three domains, a duplicate, an empty text and a broken line."""
    folder.mkdir()
    rows = prose(160, seed)
    for number, row in enumerate(rows):
        row |= {"domain": ("web", "code", "web", "maths")[number % 4], "name": f"r{number}"}
    rows[70]["text"], rows[150]["text"] = rows[3]["text"], ""
    for place in range(3):
        write_lines(folder / f"{place}.jsonl", rows[place * 50 : place * 50 + 50 + 10 * (place == 2)])
    with open(folder / "1.jsonl", "a") as file:
        file.write("{\n")
    return folder


KEYS = {"domain_key": "domain", "id_key": "name"}


def in_threads(count: int, source: Path, out: Path, **settings: Any) -> None:
    def work(worker: ThreadWorker) -> Filter:
        done = Filter(job(source, out, worker, **settings))
        done.run()
        return done

    write_outputs(on_threads(count, work)[0], out)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """Return an input, the directory of its filter run in one process, and the contents of the outputs."""
    root = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD_RECORDS", 32)
        filtered(several(root / "in"), root / "alone", **KEYS)
    return root / "in", root / "alone", outputs(root / "alone")


@pytest.fixture
def source(given) -> Path:
    return given[0]


@pytest.fixture
def alone(given, small_shards) -> dict[str, bytes]:
    return given[2]


@pytest.fixture
def finished(given, small_shards, tmp_path) -> Filter:
    """Return a finished filter on a copy of the run of `given`, in `tmp_path / "out"`."""
    done = Filter(job(given[0], Path(shutil.copytree(given[1], tmp_path / "out")), **KEYS))
    done.run()
    return done


# -- counts


def test_every_record_has_one_reason(finished):
    done, out = finished, finished.job.directory.parent
    rows = rows_of(done)
    lines = [line for part in done.job.parts for line in part.path.read_bytes().splitlines()]
    assert len(rows) == len(lines) == 161 and len(done.records.shards) == 6
    reasons = Counter(row["reason"] for row in rows)
    audit = json.loads((out / "audit.json").read_text())
    assert {name: size["documents"] for name, size in audit["reasons"].items() if size["documents"]} == reasons
    assert reasons["duplicate"] == reasons["empty"] == reasons["malformed"] == 1
    assert [line for line, row in zip(lines, rows, strict=True) if row["kept"]] == kept(out)
    assert set(rows[0]) >= {"id", "score", "domain", "length", "kept", "reason"}
    for name in ("web", "code", "maths"):
        competed = [row for row in rows if row["domain"] == name and row["reason"] in ("hard", "easy")]
        assert abs(sum(row["kept"] for row in competed) - len(competed) / 2) <= 1


def test_counts_that_do_not_add_up_are_refused(finished):
    shard = list(finished.records.shards)[1]
    finished.decided.write(shard, finished.decided.read(shard).slice(1))
    with pytest.raises(DataError, match=r"18 records were read, but {'kept': 17"):
        audit_of(finished, "in.jsonl")


def test_a_stage_that_loses_rows_is_refused(tmp_path, monkeypatch):
    real = pipeline.make_table
    monkeypatch.setattr(pipeline, "make_table", lambda **columns: real(**columns).slice("exact" in columns))
    with pytest.raises(DataError, match="39 rows for 40 records"):
        filtered(write_lines(tmp_path / "in.jsonl", prose(40)), tmp_path / "out")


# -- any number of processes


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(tmp_path, given, source, alone, count):
    in_threads(count, source, tmp_path / "out", **KEYS)
    assert outputs(tmp_path / "out") == alone
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in (given[1], tmp_path / "out")]
    assert files[0] == files[1]


def by_ranks(source: Path, out: Path) -> tuple[list[int], list[str], str, bool]:
    """Filter. Return a sum over ranks, the files seen after a barrier that rank 1 reaches late, and rank 1's error."""
    pipeline.SHARD_RECORDS = 32
    workers = WorldWorkers(connect())
    done = Filter(job(source, out, workers, **KEYS))
    done.run()
    if workers.rank == 0:
        write_outputs(done, out)
    total = workers.sum(given := np.arange(3) + workers.rank)
    assert given.tolist() == [workers.rank + n for n in range(3)], "the summand is unchanged"
    with barrier(workers):
        if workers.rank == 1:
            time.sleep(0.3)
            (out / "late").write_text("")
    late = [path.name for path in out.glob("late")]
    try:
        with barrier(workers):
            if workers.rank == 1:
                raise ConfigError("input", "x", "is wrong", ["y"])
    except ConfigError as error:
        return total.tolist(), late, str(error), error.everywhere
    raise AssertionError("no error")


@pytest.mark.slow
def test_gloo_ranks_make_the_same_bytes(tmp_path, source, alone, ranks):
    """Ranks also wait for each other, and the error of one is raised on all, so that only rank 0 prints it."""
    found = ranks(2, by_ranks, source, tmp_path / "out")
    assert found == [([1, 3, 5], ["late"], "input=x: is wrong; try y", True)] * 2
    assert outputs(tmp_path / "out") == alone


def test_an_error_of_one_worker_ends_all(tmp_path, source, small_shards):
    """Only the worker that reads the second file meets the error."""
    for count in (1, 2, 4):
        with pytest.raises(ConfigError, match=r"input=1\.jsonl:51: cannot be read: .*; try on_error=drop"):
            in_threads(count, source, tmp_path / f"{count}", on_error=OnError.fail, **KEYS)


# -- kills


def written(source: Path, out: Path, deadly: int = -1) -> list[str]:
    """Filter, but die before new file number `deadly`. Return the new files that the stages have written."""
    names: list[str] = []

    def dying(write: Callable[[Path, Any], None], path: Path, content: Any) -> None:
        if not path.exists() and len(names) == deadly:
            path.with_name(f".{path.name}.tmp").write_text("half of it")  # as a real kill leaves it
            raise KeyboardInterrupt
        names.extend([] if path.exists() else [f"{path.parent.name}/{path.name}"])
        write(path, content)

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        for module, name in ((store, "write_bytes"), (store, "write_json"), (runs, "write_bytes")):
            patch.setattr(module, name, partial(dying, getattr(module, name)))
        filtered(source, out, duplicates=DuplicateConfig(near=None))
    return names


def test_a_kill_between_any_two_writes_changes_nothing(tmp_path, monkeypatch):
    """Kill each run after one file that a stage writes, so within stages and between them."""
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 20)
    source = write_lines(tmp_path / "in.jsonl", prose(30, words=8))
    names = written(source, tmp_path / "whole")
    files = 5 * 4 + 2 + 7  # key, 2 shards and manifest of each stage; one part, the thresholds; sorted ids and copies
    assert len(set(names)) == len(names) == files
    for name in names:
        assert written(source, tmp_path / "out", 1) == [name], "nothing is made twice"
    assert written(source, tmp_path / "out") == []
    assert stages(tmp_path / "out") == stages(tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def stages(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "stages").rglob("[!.]*.*")}


@pytest.mark.parametrize("stage", ["records", "screened", "scored", "decisions"])
def test_a_lost_shard_is_made_again(finished, source, alone, stage):
    """If a damaged shard is removed, as its error advises, it is made again. A damaged manifest is named, too."""
    out = finished.job.directory.parent
    path = out / "stages" / stage / f"{list(finished.records.shards)[3]}.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{path.name} cannot be read .*: remove it and run again"):
        filtered(source, out, **KEYS)
    path.unlink()
    filtered(source, out, **KEYS)
    assert path.read_bytes() == content and outputs(out) == alone
    (path.parent / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=rf"{stage}/manifest\.json cannot be read .*: remove .*{stage} and run again"):
        filtered(source, out, **KEYS)


# -- other settings, full disks


def test_each_setting_changes_its_stage_and_all_later_ones(tmp_path):
    """A stage whose key missed a setting would be reused under another value of it."""
    source = write_lines(tmp_path / "in.jsonl", prose(3))
    exam, clean = (tmp_path / name for name in ("exam.txt", "clean.txt"))
    for path in (exam, clean):
        path.write_text(" ".join(prose(1, 5)[0]["text"].split() * 2))
    names = ["records", "screened", "scored", "decided"]

    def keys(scorer: str = "a", tokenizer: str = "bytes", clean: tuple[Record, ...] = (), **settings: Any) -> list[str]:
        contamination = settings.pop("contamination", ContaminationConfig({"exam": str(exam)}))
        one = job(source, tmp_path / "out", scorer=FixedScorer(len, scorer), contamination=contamination, **settings)
        done = Filter(replace(one, tokenizer=tokenizer, clean=clean))
        return [getattr(done, name).key for name in names] + [done.duplicates.key]

    before, changes = (
        keys(),
        {
            "text_key": ("records", {"text_key": "other"}),
            "label_key": ("records", {"label_key": "level"}),
            "gates": ("screened", {"gates": GateConfig(min_characters=5)}),
            "duplicates": ("screened", {"duplicates": DuplicateConfig(near=0.7)}),
            "words": ("screened", {"contamination": ContaminationConfig({"exam": str(exam)}, words=9)}),
            "on_error": ("screened", {"on_error": OnError.keep}),
            "seed": ("screened", {"seed": 1}),
            "tokenizer": ("screened", {"tokenizer": "other"}),
            "scorer": ("scored", {"scorer": "b"}),
            "keep": ("decided", {"keep": 0.25}),
            "unit": ("decided", {"unit": KeepUnit.tokens}),
            "floor": ("decided", {"select": SelectConfig(floor=2)}),
            "buckets": ("decided", {"select": SelectConfig(buckets=BucketRule.domain)}),
            "clean": ("decided", {"clean": (Record("1", "all", "1", "a clean text"),)}),
            "require_auc": (None, {"select": SelectConfig(require_auc=0.6)}),
        },
    )
    for name, (stage, settings) in changes.items():
        after, first = keys(**settings), names.index(stage) if stage else 4
        assert [one == other for one, other in zip(before, after, strict=True)][:4] == [n < first for n in range(4)], (
            name
        )
        assert (before[4] == after[4]) == (first > 1), name
    exam.write_text("other words " * 20)
    assert [one == other for one, other in zip(before, keys(), strict=True)] == [True, False, False, False, False]


def test_changed_settings_are_refused_by_name(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", prose(40))
    scorer = FixedScorer(lambda record: len(record.text))
    filtered(source, tmp_path / "out", scorer)
    filtered(source, tmp_path / "out", scorer)
    other = FixedScorer(scorer.score_of, "another")
    for message, settings in {
        r"scored: was made with scorer=fixed fixed \(now fixed another\); remove that folder": {"scorer": other},
        r"decisions: was made with keep=0\.5 \(now 0\.25\)": {"keep": 0.25},
        r"screened: was made with seed=0 \(now 1\)": {"seed": 1},
        r"screened: was made with on_error=drop \(now keep\)": {"on_error": OnError.keep},
        r"decisions: was made with unit=documents \(now tokens\)": {"unit": KeepUnit.tokens},
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            filtered(source, tmp_path / "out", **{"scorer": scorer, **settings})
        assert "\n" not in str(caught.value)
    write_lines(source, prose(41))
    with pytest.raises(ConfigError, match=r"records: the input changed since it was made; remove that folder"):
        filtered(source, tmp_path / "out", scorer)


def test_a_run_without_scores_does_not_block_its_correction(tmp_path):
    """Another scorer reuses the stages, and another input discards them. Control: scores are not given up so easily."""

    class Unfit(FixedScorer):
        def fit(self, records: Any) -> None:
            raise ConfigError("scorer", None, "needs labels")

    def stamps() -> list[int]:
        stages = [tmp_path / "out" / "stages" / name for name in ("records", "screened", "duplicates")]
        return [path.stat().st_mtime_ns for stage in stages for path in sorted(stage.iterdir())]

    source, unfit = write_lines(tmp_path / "in.jsonl", prose(40)), Unfit(lambda record: 0.0, "unfit")
    for count in (40, 41, 41):
        write_lines(source, prose(count))
        with pytest.raises(ConfigError, match="needs labels"):
            filtered(source, tmp_path / "out", unfit)
    assert {path.name.split("-")[0] for path in (tmp_path / "out" / "stages").iterdir()} - {".lock"} == {
        "records",
        "screened",
        "duplicates",
        "scored",
    }
    scorer = FixedScorer(lambda record: len(record.text))
    aside = sorted(path for path in (tmp_path / "out" / "stages").iterdir() if path.name.startswith("records"))
    made = max(aside, key=lambda path: path.stat().st_mtime_ns).stat().st_ino
    filtered(source, tmp_path / "out", scorer)
    assert (tmp_path / "out" / "stages" / "records").stat().st_ino == made, "read once"
    left = {path.name for path in (tmp_path / "out" / "stages").iterdir() if not path.name.startswith("scored-")}
    assert left - {".lock"} == {"records", "screened", "duplicates", "scored", "decisions"}
    shutil.rmtree(tmp_path / "out" / "stages" / "decisions")
    before = stamps()
    write_lines(source, prose(42))
    with pytest.raises(ConfigError, match="the input changed since"):
        filtered(source, tmp_path / "out", scorer)
    assert stamps() == before


@pytest.mark.parametrize(("number", "advice"), [(errno.EROFS, "make it writable, or"), (errno.EIO, "fix that and run")])
def test_advice_for_what_cannot_be_written(tmp_path, number, advice):
    with pytest.raises(DataError, match=f"cannot write {tmp_path} .*: {advice}"), store.writing(tmp_path):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", ["key.json", "00001-000000.parquet", THRESHOLDS, SCORES, KEPT])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, source, alone, monkeypatch, name):
    real = os.replace

    def full(temporary: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            DataError, match=rf"cannot write .*{name} \(No space left on device\): free some space and run"
        ):
            filtered(source, tmp_path / "out", **KEYS)
    assert {path.name for path in (tmp_path / "out").rglob(".*")} == {".lock"} and not list(
        (tmp_path / "out").rglob(name)
    )
    filtered(source, tmp_path / "out", **KEYS)
    assert outputs(tmp_path / "out") == alone


# -- strange scores, names and domains


def test_scores_that_are_all_nan_or_constant(tmp_path, small_shards):
    source = write_lines(tmp_path / "in.jsonl", prose(100))
    filtered(source, tmp_path / "none", FixedScorer(lambda record: np.nan))
    assert kept(tmp_path / "none") == []
    for seed in (0, 1):
        filtered(source, tmp_path / f"{seed}", FixedScorer(lambda record: 3.0), seed=seed)
    first, second = kept(tmp_path / "0"), kept(tmp_path / "1")
    assert len(first) == len(second) == 50 and first != second, "the draw among equal scores has a seed"


def test_domains_of_one_document_and_hostile_names(tmp_path, small_shards):
    """Names have quotes, newlines, HTML and a right-to-left mark; one is `unreadable`, as for broken records."""
    names = ['"', "a\nb", "<script>alert(1)</script>", "unreadable", "\u202ex", "", "'; drop", "${run.name}", "🐘"]
    rows = [
        {**row, "name": f"<b>{n}\n\"'", "domain": names[n] if n < len(names) else "rest"}
        for n, row in enumerate(prose(99))
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    with open(source, "a") as file:
        file.write("broken\n")
    done = filtered(source, tmp_path / "out", **KEYS)
    found = rows_of(done)
    assert [row["domain"] for row in found] == [row["domain"] for row in rows] + ["unreadable"]
    assert [row["id"] for row in found[:-1]] == [row["name"] for row in rows]
    assert done.domains == sorted([*names, "rest"])
    for name in names:
        (row,) = [row for row in found if row["domain"] == name and row["reason"] != "malformed"]
        assert row["kept"], "every domain keeps a record"
    assert abs(sum(row["kept"] for row in found if row["domain"] == "rest") - 45) <= 1
    thresholds = json.loads((tmp_path / "out" / "audit.json").read_text())["thresholds"]["domains"]
    assert thresholds["unreadable"]["passed"] == 1, "the user's domain, without malformed records"


def test_an_input_of_which_nothing_is_kept(tmp_path):
    for n, text in enumerate(("", "too short")):
        source = write_lines(tmp_path / f"{n}.jsonl", [{"text": text}])
        done = filtered(source, tmp_path / f"{n}")
        assert kept(tmp_path / f"{n}") == [] and not Reason[rows_of(done)[0]["reason"]].kept
    source.write_text("\n")
    with pytest.raises(ConfigError, match=r"input: 1\.jsonl holds no record"):
        filtered(source, tmp_path / "none")


# -- the noise threshold


def test_what_is_harder_than_clean_text_is_noise(tmp_path, small_shards):
    """The noise threshold comes from scores of the `clean` file. They are stored: a rerun does not score again."""
    source = write_lines(tmp_path / "in.jsonl", prose(100))
    clean = write_lines(tmp_path / "clean.jsonl", [row for row in prose(100) if len(row["text"]) < 150])
    scorer = FixedScorer(lambda record: len(record.text))
    select = SelectConfig(clean=str(clean), noise_quantile=1.0, length_buckets=1)
    records = clean_records(str(clean), InputConfig(input=str(source)))

    def run(out: str, clean: Sequence[Record]) -> list[dict[str, Any]]:
        done = Filter(replace(job(source, tmp_path / out, scorer=scorer, select=select), clean=clean))
        done.run()
        write_outputs(done, tmp_path / out)
        return rows_of(done)

    rows = run("out", records)
    noise = {row["id"] for row in rows if row["reason"] == "noise"}
    assert noise == {row["id"] for row in rows if row["score"] >= 150} and noise
    assert not {row["id"] for row in run("without", ())} & {"noise"}, "control: no noise without a clean file"
    shutil.rmtree(tmp_path / "out" / "stages" / "decisions")
    scorer.score = lambda records: pytest.fail("stored scores are used")  # type: ignore[method-assign]
    assert run("out", records) == rows


def test_other_clean_text_is_scored(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", prose(60))
    for limit in (180, 150):
        clean = [Record(str(n), "c", "c", "x" * n) for n in range(100, limit)]
        scorer = FixedScorer(lambda record: len(record.text))
        select = SelectConfig(clean="clean", noise_quantile=1.0)
        shutil.rmtree(tmp_path / "out" / "stages" / "decisions", ignore_errors=True)
        done = Filter(replace(job(source, tmp_path / "out", scorer=scorer, select=select), clean=clean))
        done.run()
        write_outputs(done, tmp_path / "out")
        noise = {row["id"] for row in rows_of(done) if row["reason"] == "noise"}
        assert noise == {row["id"] for row in rows_of(done) if row["score"] >= limit} and noise


def test_unanswered_clean_text_is_asked_again(tmp_path):
    source, answering = write_lines(tmp_path / "in.jsonl", prose(40)), range(10)
    clean = [Record(str(n), "c", "c", "x" * (100 + n)) for n in range(40)]
    scorer = FixedScorer(lambda one: len(one.text) if one.source != "c" or int(one.id) in answering else np.nan)
    scorer.reasons = {}
    for count in (10, 40):
        answering = range(count)
        done = Filter(replace(job(source, tmp_path / "out", scorer=scorer), clean=clean))
        done.run()
    assert done._noise() > 137, "the limit is that of all clean text"


def test_labels_of_copies_are_those_of_the_proof(tmp_path):
    rows = prose(80)
    labelled = [{**row, "level": number % 5} for number, row in enumerate(rows)]
    source = write_lines(tmp_path / "in.jsonl", [{**row, "level": None} for row in rows] + labelled)
    done = Filter(job(source, tmp_path / "out", scorer=FixedScorer(lambda record: len(record.text)), label_key="level"))
    done.run()
    assert len([one for one in done.passed() if one.label is not None]) == 80
    assert done.proof and done.proof["labels"]["records"] == 80


def test_labels_of_near_duplicates_do_not_count(tmp_path):
    texts = [row["text"] for row in prose(40, words=60)]
    rows = [{"text": text, "level": 1 + n % 5} for n, text in enumerate(texts)]
    rows.append({"text": texts[0] + " again", "level": 99})
    done = filtered(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out", LengthScorer(), label_key="level")
    assert rows_of(done)[40]["reason"] == "near_duplicate"
    assert next(iter(done.passed())).label == 1
    assert done.mean_labels(next(iter(done.records.shards)))[0] == 1
