"""The verb `filter` from its command line."""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import combinations
from pathlib import Path

import pyarrow.parquet
import pytest

from core.config import build, load
from core.errors import ConfigError
from core.files import lock_folder
from data.filter.audit.separation import spearman
from data.filter.config import FilterRules, ScorerKind, decisive_settings
from launch.cli import main
from launch.filter.config import FilterConfig, command_of
from tests.support.filtering import outputs, prose, rows_in, write_lines

ADVICE = "wait for it, stop it, or choose another out="


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"question": row["text"], "answer": prose(1, seed=n + 1)[0]["text"]} for n, row in enumerate(prose(120))]
    return write_lines(tmp_path_factory.mktemp("input") / "pairs.jsonl", rows)


def arguments(pairs: Path, out: Path) -> list[str]:
    keys = ["prompt_key=question", "response_key=answer"]
    return [f"input={pairs}", *keys, "scorer.kind=ngram", "keep=0.5", f"out={out}"]


@pytest.fixture(scope="module")
def out(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("filtered") / "out"
    assert main(["filter", *arguments(pairs, found)]) == 0
    return found


def test_filters_a_file(pairs, out):
    rows, lines = rows_in(out), pairs.read_bytes().splitlines()
    assert {"id", "score", "domain", "length", "kept", "reason"} <= set(rows[0]) and len(rows) == 120
    assert [row["id"] for row in rows] == [f"pairs.jsonl:{n}" for n in range(1, 121)]
    wanted = [line for line, row in zip(lines, rows, strict=True) if row["kept"]]
    assert (out / "kept.jsonl").read_bytes() == b"".join(line + b"\n" for line in wanted)
    given, size = sum(row["tokens"] for row in rows), sum(row["tokens"] for row in rows if row["kept"])
    assert abs(size - given / 2) <= max(row["tokens"] for row in rows), "half of the tokens, within one document"
    audit = json.loads((out / "audit.json").read_text())
    assert audit["totals"]["in"]["documents"] == 120 == sum(one["documents"] for one in audit["reasons"].values())
    page = (out / "audit.html").read_text()
    assert "prompt_key=question" in page and "pairs.jsonl" in page
    assert not list(out.glob(".*")) and (out / "stages").is_dir()


def test_a_folder_of_other_files_is_not_written_to(pairs, tmp_path, refused):
    (tmp_path / "out" / "stages").mkdir(parents=True)
    (tmp_path / "out" / "kept.jsonl").write_text("mine")
    line = refused("filter", *arguments(pairs, tmp_path / "out"))
    assert line.endswith("out: holds kept.jsonl, but no filter run; choose another folder")
    assert (tmp_path / "out" / "kept.jsonl").read_text() == "mine"


def test_explains_a_record(out, refused, capsys):
    rows = rows_in(out)
    for kept in (True, False):
        row = next(row for row in rows if row["kept"] == kept)
        assert main(["filter", f"explain={row['id']}", f"out={out}"]) == 0
        first, size, score, threshold = capsys.readouterr().out.splitlines()
        assert first == f"{row['id']} ({row['id']}, domain all): {'kept, hard' if kept else 'dropped, easy'}"
        sizes = f"{row['length']:,} bytes, {row['scored_bytes']:,} of them scored"
        assert size == f"length {sizes}, {row['tokens']:,} tokens"
        assert score.startswith(f"score {row['score']:.4f}, higher than ")
        value = float(threshold.split()[1])
        assert (row["score"] >= value - 1e-3) if kept else (row["score"] <= value + 1e-3), "its own threshold"
    assert refused("filter", "explain=pairs.jsonl:121", f"out={out}").startswith(
        "explain=pairs.jsonl:121: no record has this name; there are 120 records, pairs.jsonl:1 to pairs.jsonl:120"
    )
    line = refused("filter", "explain=x", f"out={out}/none")
    assert line.endswith("holds no finished filter run (scores.parquet is missing)")


def test_prints_a_summary_and_warnings(tmp_path, capsys):
    first, *others = prose(39)
    source = write_lines(tmp_path / "in.jsonl", [first, first, *others, {"no": 1}])
    assert main(["filter", f"input={source}", "unit=documents", f"out={tmp_path / 'out'}"]) == 0
    *_, summary, warning, page = capsys.readouterr().out.splitlines()
    assert summary.startswith(
        "kept 20 of 41 records (51.3% of the documents that passed the gates); dropped 19 easy, 1 malformed, 1 duplicate"
    )
    assert warning == "warning: 1 record of 41 could not be read; see the examples."
    assert page == f"audit: {tmp_path / 'out' / 'audit.html'}"


@pytest.mark.parametrize("name", ["scores.parquet", "audit.json"])
def test_explaining_a_damaged_run_is_one_line(out, tmp_path, refused, name):
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    for content in ("", "PAR1 and no more", "{}", "[]"):
        (tmp_path / name).write_text(content)
        line = refused("filter", "explain=pairs.jsonl:3", f"out={tmp_path}", code=1)
        assert line.startswith(f"{tmp_path / name} cannot be read (")
        assert line.endswith("): filter again with the same out to rewrite it")


def test_a_rerun_computes_nothing(pairs, out, refused, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in (out / "stages").rglob("*.parquet")}
    assert main(["filter", *arguments(pairs, out)]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "stages").rglob("*.parquet")}
    assert "scored" not in capsys.readouterr().out
    line = refused("filter", *arguments(pairs, out), "scorer.kind=length")
    assert "scored: was made with scorer=ngram " in line and "(now length " in line and "choose another out=" in line


def test_two_filters_do_not_share_a_folder(pairs, tmp_path, refused):
    """`lock_folder` is what another process would have called."""
    words = arguments(pairs, tmp_path / "out")
    with lock_folder(tmp_path / "out" / "stages"):
        line = refused("filter", *words)
    assert line == f"out={tmp_path}/out/stages: another command filters into this folder; {ADVICE}"
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert main(["filter", *words]) == 0, "the lock ends with the process that holds it"
    lock = lock_folder(tmp_path / "out" / "stages")
    assert lock is not None, "a filter that has ended holds no lock"
    lock.close()


@pytest.mark.parametrize("word", ["label_key=true", "label_key=", "domain_key=false"])
def test_a_column_has_a_name(pairs, tmp_path, refused, word):
    key = word.split("=")[0]
    line = refused("filter", *arguments(pairs, tmp_path / "out"), word)
    assert line.startswith(f"{key}=") and line.endswith(": must be the name of a column")
    assert not (tmp_path / "out").exists(), "rejected before the input is read"


def test_the_audit_compares_the_members_of_an_ensemble(pairs, tmp_path):
    members = "[{kind: ngram, order: 2}, {kind: ngram, order: 4}, {kind: length}]"
    settings = ["scorer.kind=ensemble", f"scorer.members={members}"]
    assert main(["filter", *arguments(pairs, tmp_path / "out"), *settings]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet")
    columns = {name.removeprefix("score:"): table[name].to_numpy() for name in table.column_names if "score:" in name}
    assert list(columns) == ["ngram[0]", "ngram[1]", "length", "random"]
    columns["ensemble"] = table["score"].to_numpy()
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    found = {tuple(sorted(one["scorers"])): one["correlation"] for one in audit["agreement"]}
    assert set(found) == {tuple(sorted(pair)) for pair in combinations(columns, 2)}
    for (one, other), correlation in found.items():
        assert correlation == pytest.approx(spearman(columns[one], columns[other]), abs=1e-4)
    assert "ngram[1]" in (tmp_path / "out" / "audit.html").read_text()


def test_bad_input_is_one_line_and_exit_code_2(pairs, tmp_path, refused):
    unread = "input: none of 120 records can be read; pairs.jsonl:1: no 'text'; it has 'question', 'ans"
    usual = arguments(pairs, tmp_path / "out")
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": 3}])
    cases = {
        (): "input: name a file or folder (input=...), or a data set (dataset=...)",
        ("input=/none",): "input=/none: no such file or folder",
        (f"input={pairs}", f"out={tmp_path / 'out'}"): unread,
        (*usual, "scorer.kind=auto"): "scorer.kind=auto: no scorer tells hard prompts from easy without labels",
        (*usual, "scorer.nothing=1"): "scorer.nothing: no such key",  # a scorer may contain scorers
        (*usual, "keep=0"): "keep=0.0: must lie in (0, 1]; try 0.5",
        (*usual, "processes=0"): "processes=0: must be positive",
        (*usual, "run=here"): "run=here: requires the id of a record to explain; try explain=ID",
        (*usual, "scorer.kind=loss"): "scorer.model: the scorer loss needs it",
        (*usual, "select.clean=/none.txt"): "select.clean=/none.txt: no such file",
        (*usual, "tokenizer=/none.json"): "tokenizer=/none.json: ",
        (f"input={bad}", "on_error=fail", f"out={tmp_path}/o"): "input=bad.jsonl:1: cannot be read: 'text' is int, not",
        (f"input={pairs}", "id_key=question", "text_key=question", "dataset=x"): "input=",
    }
    for words, message in cases.items():
        assert message in refused("filter", *words), words
    assert not (tmp_path / "out" / "kept.jsonl").exists()


IMPOSSIBLE = {
    "+contamination.sets.mine=/none.txt": "contamination.sets.mine=/none.txt: no such file",
    "gates.languages=[en,english]": "gates.languages=english: py3langid does not know it",
    "+select.domains.web=0.5": "select.domains=web: no record is of this domain; try all",
    "select.protect=[web]": "select.protect=web: no record is of this domain",
}


@pytest.mark.parametrize("word, message", IMPOSSIBLE.items())
def test_impossible_rules_are_rejected_before_scoring(pairs, tmp_path, refused, word, message):
    if "languages" in word:
        pytest.importorskip("py3langid")
    assert refused("filter", *arguments(pairs, tmp_path / "out"), word).startswith(message)
    made = [path.name.split("-")[0] for path in (tmp_path / "out" / "stages").glob("[!.]*")]
    assert made == (["records"] if "select" in word else [])


@pytest.mark.parametrize(
    "words",
    [
        ["dataset=some/set", "split='train[:5%]'", "unit=documents", "scorer.window=64", "keep=0.3"],
        ["input='my file, (1)=\\'x\\'.jsonl'", "template='{prompt} $\\{x\\} \\\\ {response}'"],
        ["input=a", "+select.domains.web=0.2", "select.protect=[a, 'b c']", "gates.languages=[en]"],
        ["input=a", "duplicates.near=null"],
        ["input=a", "messages_key=chat", "label_key=level"],
        ["input=a", "messages_key=chat", "scorer.kind=ngram"],
        ["input=a", "scorer.kind=ensemble", "scorer.members=[{kind: random}, {kind: length}]"],
        ["input=a", "messages_key=chat", "scorer.labeler={kind: judge, url: 'http://a/v1', judge: b, answers: '~/c'}"],
    ],
)
def test_the_command_in_the_audit_repeats_the_filter(words):
    config = load("filter", FilterConfig, words)
    leviathan, verb, *again = shlex.split(command_of(config))
    assert (leviathan, verb) == ("leviathan", "filter")
    assert load("filter", FilterConfig, again) == config


def test_prompts_are_scored_by_labels_and_documents_by_ngram():
    pairs = {"input": "a", "prompt_key": "q", "response_key": "a"}
    judge = {"kind": "judge", "url": "http://localhost/v1", "judge": "m"}
    wanted = [
        ({"input": "a", "label_key": "level"}, "ngram"),
        (pairs | {"label_key": "level"}, "learned"),
        (pairs | {"scorer": {"labeler": judge}}, "learned"),
        (pairs | {"scorer": {"model": "other"}}, "learned"),
        (pairs | {"scorer": {"kind": "length"}}, "length"),
    ]
    for values, kind in wanted:
        assert build(FilterConfig, values).rules().scorer.kind is ScorerKind[kind], values
    assert decisive_settings(build(FilterConfig, {"input": "a"}).rules()) == decisive_settings(FilterRules())
    with pytest.raises(ConfigError, match=r"try label_key=COLUMN, scorer.labeler=\{.*\} or scorer.kind=ngram"):
        build(FilterConfig, pairs)


@pytest.mark.slow  # 14 s; two gloo ranks make the same bytes in tests/data/filter/test_pipeline.py
def test_two_processes_make_the_same_files(pairs, tmp_path, command):
    """Each process reads one of two input files."""
    lines, folder = pairs.read_bytes().splitlines(keepends=True), tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(lines[:60]))
    (folder / "b.jsonl").write_bytes(b"".join(lines[60:]))
    assert main(["filter", *arguments(folder, tmp_path / "alone")]) == 0
    found = command("filter", "processes=2", *arguments(folder, tmp_path / "out"))
    assert found.returncode == 0, found.stderr
    assert outputs(tmp_path / "out") == outputs(tmp_path / "alone")
    with open(folder / "b.jsonl", "a") as file:
        file.write("{\n")
    found = command("filter", "processes=2", *arguments(folder, tmp_path / "other"), "on_error=fail")
    assert found.returncode == 2, "an error of rank 1 alone is printed in one line"
    (line,) = [line for line in found.stderr.splitlines() if line]
    assert line.startswith("leviathan: error: input=b.jsonl:61: cannot be read: ")
