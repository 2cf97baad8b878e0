"""Records that the server did not answer: the reason is shown, and the next run requests only these."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from core.files import sha256_text
from data.filter import pipeline
from data.filter.config import FilterRules, InputConfig, ScorerConfig, ScorerKind, decisive_settings
from data.filter.input.readers import clean_records
from data.filter.pipeline import Filter
from data.filter.score.judge import JudgeScorer
from launch.cli import main
from launch.filter.config import FilterConfig
from tests.data.filter.test_pipeline import in_threads
from tests.support.fakes.llm_server import Reply, completion, graded
from tests.support.filtering import FixedScorer, filtered, job, kept, outputs, prose, rows_in, write_lines

LOST = {3, 11, 17, 40, 49}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 10)
    return write_lines(tmp_path / "in.jsonl", prose(50, words=30))


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].split("Note 0-")[1].split(":")[0])


def healthy(body: dict[str, Any], turn: int) -> Reply:
    return graded(1 + number_of(body) % 5)


def lying(body: dict[str, Any], turn: int) -> Reply:
    return completion("I would say 4") if number_of(body) in LOST else healthy(body, turn)


def command(server: Any, source: Path, out: Path, *more: str) -> int:
    judge = ["scorer.kind=judge", f"scorer.url={server.url}", "scorer.judge=grader", "scorer.retries=0"]
    return main(["filter", f"input={source}", f"out={out}", "unit=documents", *judge, "scorer.rubric=quality", *more])


def test_only_unanswered_records_are_asked_again(server, source, tmp_path, capsys, request):
    out = tmp_path / "out"
    server.reply = lying
    assert command(server, source, out) == 0
    lines = capsys.readouterr().out.splitlines()
    (cost,) = [place for place, line in enumerate(lines) if line.startswith("50 requests to grader, about ")]
    (first, *_) = [place for place, line in enumerate(lines) if line.startswith("scored")]
    assert cost < first and lines[cost].endswith(f"; 0 answers are in {tmp_path}/home/.cache/leviathan/answers")
    assert any(line.startswith("kept ") and " worse, " in line for line in lines), (
        "a document of low quality is not easy"
    )
    rows = rows_in(out)
    lost = {place for place, row in enumerate(rows) if row["reason"] == "unscored"}
    assert lost == LOST == {place for place, row in enumerate(rows) if row["why"] is not None}
    assert {rows[place]["why"] for place in LOST} == {"not JSON: 'I would say 4'"}
    capsys.readouterr()
    assert main(["filter", "explain=in.jsonl:4", f"out={out}"]) == 0
    assert "no score: not JSON: 'I would say 4'" in capsys.readouterr().out
    examples = json.loads((out / "audit.json").read_text())["examples"]
    assert {row["why"] for row in examples["unscored"]} == {"not JSON: 'I would say 4'"}
    assert not any("why" in row for reason, rows in examples.items() if reason != "unscored" for row in rows)
    page = (out / "audit.html").read_text()
    assert "no score: <bdi>not JSON: &#39;I would say 4&#39;" in page and "<b>worse</b>" in page
    assert "A high score means better text" in page and "<b>easy</b>" not in page and "<b>hard</b>" not in page

    request.getfixturevalue("no_page")
    before = outputs(out)
    assert command(server, source, out) == 0
    assert outputs(out) == before, "a server that keeps lying changes nothing"
    capsys.readouterr()
    server.requests.clear()
    server.reply = healthy
    assert command(server, source, out) == 0
    assert {number_of(body) for body in server.requests} == LOST and len(server.requests) == len(LOST)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scored")]
    assert said == [f"scored 00000-00000{shard}: {count} records" for shard, count in ((0, 1), (1, 2), (4, 2))]
    again = rows_in(out)
    assert [row["score"] for row in again] == [1 + place % 5 for place in range(50)]
    assert not any(row["why"] for row in again) and "unscored" not in {row["reason"] for row in again}
    server.requests.clear()
    assert command(server, source, out) == 0
    assert not server.requests and "scored" not in capsys.readouterr().out.splitlines()[-1]
    assert command(server, source, tmp_path / "whole") == 0 and not server.requests, "another out asks nobody"
    assert outputs(out) == outputs(tmp_path / "whole"), "as if the server had been healthy from the start"


def test_another_way_to_the_same_judge_changes_nothing(server, source, tmp_path, no_page):
    """Scores depend neither on the server's URL and key variable nor on concurrency, timeout and retries."""
    server.reply = healthy
    assert command(server, source, tmp_path / "out") == 0
    server.requests.clear()
    url = server.url.replace("127.0.0.1", "localhost")
    answers = f"scorer.answers={tmp_path}/none"  # the scores are stored too
    ways = ["scorer.concurrency=2", "scorer.timeout_s=9", "scorer.retries=3", "scorer.key_variable=K", answers]
    assert command(server, source, tmp_path / "out", f"scorer.url={url}", *ways) == 0
    assert not server.requests
    assert command(server, source, tmp_path / "out", "scorer.judge=another") == 2
    member = ScorerConfig(ScorerKind.judge, url=server.url, judge="grader")
    rules = [
        FilterRules(scorer=ScorerConfig(ScorerKind.ensemble, members=[one, ScorerConfig()]))
        for one in (
            member,
            replace(member, url=url, answers="a"),
            replace(member, judge="b"),
            replace(member, rubric="c"),
        )
    ]
    same, connection, *others = map(decisive_settings, rules)
    assert same == connection and same not in others and others[0] != others[1]


def test_several_workers_ask_again_together(server, source, tmp_path):
    def judge() -> JudgeScorer:
        return JudgeScorer(ScorerConfig(ScorerKind.judge, url=server.url, judge="grader", retries=0, rubric="quality"))

    server.reply = lying
    filtered(source, tmp_path / "out", judge())
    server.requests.clear()
    server.reply = healthy
    in_threads(2, source, tmp_path / "out", scorer=judge())
    assert {number_of(body) for body in server.requests} == LOST and len(server.requests) == len(LOST)
    filtered(source, tmp_path / "whole", judge())
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_members_of_an_ensemble_are_asked_again(server, source, tmp_path, no_page):
    server.reply = lying
    judge = f"{{kind: judge, url: '{server.url}', judge: grader, retries: 0, rubric: quality}}"
    members = f"scorer.members=[{judge}, {{kind: length}}]"
    words = [f"input={source}", f"out={tmp_path / 'out'}", "scorer.kind=ensemble", members]
    assert main(["filter", *words]) == 0
    rows = rows_in(tmp_path / "out")
    assert {place for place, row in enumerate(rows) if row["why"]} == LOST
    assert rows[3]["why"] == "judge: not JSON: 'I would say 4'" and np.isnan(rows[3]["score:judge"])
    server.reply = healthy
    assert main(["filter", *words]) == 0
    rows = rows_in(tmp_path / "out")
    assert [row["score:judge"] for row in rows] == [1 + place % 5 for place in range(50)]
    assert np.isfinite([row["score"] for row in rows]).all() and not any(row["why"] for row in rows)


def test_a_judge_that_gives_one_grade_is_reported(server, source, tmp_path, capsys, no_page):
    assert command(server, source, tmp_path / "out") == 0
    assert "warning: All scores are equal, so the selection is random" in capsys.readouterr().out


@pytest.mark.parametrize("member", [False, True])
@pytest.mark.parametrize("kind", ["judge", "pass_rate"])
def test_prompts_are_required_before_the_first_request(kind, member):
    scorer = ScorerConfig(ScorerKind[kind], url="http://localhost:1/v1", judge="m", verifier="v:f")
    if member:
        scorer = ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig(), scorer])
    key = r"scorer\.members\[1\]" if member else "scorer"
    with pytest.raises(ConfigError, match=rf"^{key}\.\w+=\w+: requires prompts: set prompt_key"):
        FilterConfig(input="in.jsonl", scorer=scorer)
    FilterConfig(input="in.jsonl", prompt_key="q", response_key="a", scorer=scorer)
    if kind == "judge" and not member:
        FilterConfig(input="in.jsonl", scorer=replace(scorer, rubric="quality"))


def test_a_verifier_may_say_anything(server, source, tmp_path, monkeypatch, no_page):
    (tmp_path / "raising.py").write_text("def check(record, answer): raise ValueError('\\n' + '\\ud800' * 500)")
    monkeypatch.syspath_prepend(tmp_path)
    server.reply = lambda body, turn: completion("4")
    rows = [{"q": row["text"], "a": row["text"]} for row in prose(12)]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    more = ["scorer.kind=pass_rate", "scorer.verifier=raising:check", "prompt_key=q", "response_key=a"]
    assert command(server, pairs, tmp_path / "out", *more) == 0
    whys = {row["why"] for row in rows_in(tmp_path / "out")}
    assert (
        len(whys) == 1 and (why := whys.pop()).startswith(r"the verifier raised ValueError: \ud800") and len(why) == 200
    )


def test_answers_that_cannot_be_stored_are_one_line(server, source, tmp_path, capsys):
    """The error must be raised on all processes, since the others would wait forever."""
    (tmp_path / "answers").write_text("")
    assert command(server, source, tmp_path / "out", f"scorer.answers={tmp_path}/answers") == 1
    (line,) = capsys.readouterr().err.splitlines()
    wanted = (
        r"leviathan: error: cannot write .*answers/judge-grader-\w+.jsonl .File exists.: a file is where a folder must"
    )
    assert re.match(wanted, line)


def by_number(sign: int = 1) -> FixedScorer:
    """Score by line number times `sign`. Both scorers have one fingerprint, so stored scores stay valid."""
    return FixedScorer(lambda record: sign * float(record.source.split(":")[1]))


def test_other_scores_make_other_decisions(source, tmp_path):
    """If scores are removed, as the error for damaged ones advises, decisions follow the new scores."""
    out, hard, easy = tmp_path / "out", by_number(), by_number(-1)
    filtered(source, out, hard)
    assert len(kept(out)) == 25
    stamps = {path.stat().st_mtime_ns for path in (out / "stages" / "decisions").iterdir()}
    shutil.rmtree(out / "stages" / "scored")
    filtered(source, out, hard)
    assert stamps == {path.stat().st_mtime_ns for path in (out / "stages" / "decisions").iterdir()}
    shutil.rmtree(out / "stages" / "scored")
    filtered(source, out, easy)
    filtered(source, tmp_path / "new", easy)
    assert rows_in(out) == rows_in(tmp_path / "new") and kept(out) == kept(tmp_path / "new")
    with pytest.raises(ConfigError, match=r"decisions: was made with keep=0\.5 \(now 0\.25\)"):
        filtered(source, out, easy, keep=0.25)


def test_other_rules_are_refused_before_scoring_clean_text(source, tmp_path):
    scorer = by_number()
    filtered(source, tmp_path / "out", scorer)
    scorer.score = lambda records: pytest.fail("this may take hours")  # type: ignore[method-assign]
    (clean,) = clean_records(str(write_lines(tmp_path / "clean.jsonl", prose(1))), InputConfig(input=""))
    with pytest.raises(ConfigError, match="decisions: the clean texts changed since it was made"):
        Filter(replace(job(source, tmp_path / "out", scorer=scorer), clean=[clean])).run()


def test_a_kill_while_decisions_are_removed_leaves_none(source, tmp_path, monkeypatch):
    out, easy, real, removed = tmp_path / "out", by_number(-1), Path.unlink, []
    filtered(source, out, by_number())
    shutil.rmtree(out / "stages" / "scored")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "decisions" and not path.name.startswith("."):
            removed.append(path)
            if len(removed) == 3:
                raise KeyboardInterrupt
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        filtered(source, out, easy)
    monkeypatch.setattr(Path, "unlink", real)
    filtered(source, out, easy)
    filtered(source, tmp_path / "new", easy)
    assert kept(out) == kept(tmp_path / "new")


def test_renamed_settings_keep_their_digest():
    """The order of samples depends on the digest, so a renamed key must not change it."""
    settings = json.dumps(decisive_settings(FilterRules(keep=0.5)))
    assert sha256_text(settings)[:16] == "8fc09e97a9c84d04", settings
