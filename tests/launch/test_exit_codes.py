"""docs/exit_codes.md names the codes of `core.exit_codes` and all verbs, and every verb returns them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from core import exit_codes
from core.errors import CheckpointError, ConfigError
from core.exit_codes import CRASHED, DONE, FAILED, INTERRUPTED, INVALID
from launch.cli import VERBS, main
from tests.support.verbs import GIVEN

PAGE = (Path(__file__).parents[2] / "docs" / "exit_codes.md").read_text()


def codes_in(page: str) -> dict[str, int]:
    """Return the rows of the page's table of codes."""
    return {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)}


def codes_of(module: object) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}


def verbs_in(page: str) -> list[str]:
    """Return the verbs of the page's second table, each with what 0 and 1 mean."""
    return re.findall(r"^\| `([a-z]+)` \| .+ \| .+ \|$", page, re.MULTILINE)


def test_the_page_lists_the_codes_and_the_verbs():
    assert codes_in(PAGE) == codes_of(exit_codes)
    assert verbs_in(PAGE) == list(VERBS)


def test_another_code_or_verb_than_the_pages_is_noticed():
    assert codes_in(PAGE.replace("| 4 | `HUNG`", "| 5 | `HUNG`")) != codes_of(exit_codes)
    assert codes_in(PAGE) != codes_of(SimpleNamespace(**vars(exit_codes), LOST=6))
    assert verbs_in(PAGE.replace("| `doctor` |", "| `docter` |")) != list(VERBS)


OUTCOMES = {
    "done": (DONE, DONE),
    "a check that does not hold": (FAILED, FAILED),
    "a damaged checkpoint": (CheckpointError("damaged"), FAILED),
    "a full disk": (OSError(28, "No space left on device"), FAILED),
    "an unexpected error": (ZeroDivisionError("x"), FAILED),
    "a useless path": (ConfigError("run", "r", "no run there"), INVALID),
    "ctrl-c": (KeyboardInterrupt(), INTERRUPTED),
}


@pytest.mark.parametrize("outcome, code", OUTCOMES.values(), ids=OUTCOMES)
@pytest.mark.parametrize("name", VERBS)
def test_the_outcome_of_a_verb_decides_its_code(name, outcome, code, monkeypatch, tmp_path, capsys):
    def function(config: object) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setenv("LEVIATHAN_TRACEBACKS", str(tmp_path))
    monkeypatch.setattr("core.config.load", lambda *values: None)  # half a second
    verb = VERBS[name]
    monkeypatch.setattr(importlib.import_module(f"launch.verbs.{verb.module or name}"), verb.function, function)
    assert main([name]) == code
    assert len(capsys.readouterr().err.splitlines()) == isinstance(outcome, BaseException)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_refuses_an_unknown_key(name, capsys):
    unknown = "check.no_such=1" if name == "metap" else "no_such_key=1"  # metap takes other keys for those of train
    assert main([name, *GIVEN.get(name, []), unknown]) == INVALID
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_real_failures_have_the_codes_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    found = [main(words.split()) for words in ("import empty o", "export empty o")]
    assert found == [FAILED] * 2
    invalid = (
        "evaluate empty",
        "generate empty",
        "report empty",
        "certify ranks=1",
        "jobs show x",
        "metap fit",
        "tokenize data.held_out=1",
    )
    assert [main(words.split()) for words in invalid] == [INVALID] * len(invalid)
    assert main(["jobs"]) == DONE
    monkeypatch.setattr("launch.diagnose.doctor.examine", lambda folders: {"problems": ["torch is missing"]})
    monkeypatch.setattr("launch.diagnose.doctor.table", lambda found: "")
    assert main(["doctor"]) == FAILED
    monkeypatch.setattr("launch.diagnose.doctor.examine", lambda folders: {"problems": []})
    assert main(["doctor"]) == DONE


@pytest.mark.parametrize("ranks, code", [(DONE, DONE), (INVALID, INVALID), (CRASHED, FAILED)])
def test_the_user_does_not_see_the_codes_of_the_agent(ranks, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("launch.agent.run", lambda node: ranks)
    monkeypatch.setattr("launch.local.check_processes", lambda *values: None)
    line = ["train", "launch=torchrun", "launch.processes=2", f"run.root={tmp_path}", "run.name=run"]
    assert main(line) == code
    assert len(capsys.readouterr().err.splitlines()) == (code == FAILED)
