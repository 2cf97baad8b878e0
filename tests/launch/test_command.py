"""The command as users run it: every verb, folders with clashing names, torchrun, Ctrl-C and errors of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from core.package_guard import ROOT, ForeignPackageError, check_packages, drop_working_directory
from tests.support.drills import ended, has_step, wait_for
from tests.support.tiny import TINY

BIN = Path(sys.executable).parent
TWO_RANKS = ["launch=torchrun", "launch.processes=2"]


def start(arguments: list[str], cwd: Path, folder: Path = BIN) -> subprocess.Popen[str]:
    """Train in a new session, with one thread as in `command`: the number of threads changes the rounding. `folder`: that
    of the executable.
    """
    line, pipe = [str(folder / "leviathan"), "train", *arguments], subprocess.PIPE
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=cwd, stdout=pipe, stderr=pipe, text=True, env=variables, start_new_session=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_corpus, executables) -> Path:
    root = tmp_path_factory.mktemp("runs")
    own = [f"run.root={root}", "run.name=done", "checkpoint.every=3", "evaluation.baselines=true"]
    process = start([*TINY, *small_corpus, *own], root, executables)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == f"run: {root / 'done'}"
    return root / "done"


def test_a_run_leaves_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["tokens"] == 6 * 8 * 48 and summary["world_size"] == 1
    for key in ("train_loss", "heldout_loss", "unigram_loss", "bigram_loss", "tokens_per_second"):
        assert isinstance(summary[key], float) and summary[key] > 0, key
    for key in ("peak_memory_bytes", "total_parameters", "active_parameters"):
        assert isinstance(summary[key], int) and summary[key] > 0, key
    assert summary["active_parameters"] < summary["total_parameters"]
    assert set(summary["heldout"]["sources"]) == {"text", "code"}
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["heldout_loss"] == summary["heldout_loss"] and set(lines[-1]["heldout"]) == {"text", "code"}
    last = [line for line in lines if "loss" in line][-1]
    wanted = {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "peak_memory_bytes"}
    assert wanted <= set(last) and last["mfu"] is None, "a CPU has no MFU"
    assert len(last["expert_load"]) == len(last["router_z"]) == len(last["router_entropy"]) == 2
    assert (finished / "config.yaml").exists() and (finished / "log.txt").exists()


def test_evaluate_repeats_the_runs_own_figure(finished, command):
    done = command("evaluate", f"run={finished}", "sequences=4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == json.loads((finished / "summary.json").read_text())["heldout_loss"]


def test_generate_is_a_function_of_its_seed(finished, command):
    texts = [
        command("generate", f"run={finished}", "prompt=the model", "tokens=12", f"seed={s}").stdout for s in (0, 0, 1)
    ]
    assert texts[0].startswith("the model") and texts[0] == texts[1] != texts[2]


def test_tokenize_makes_what_data_tokens_takes(command, small_corpus, tmp_path):
    done = command("tokenize", *small_corpus, f"out={tmp_path / 'tokens'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"tokens: {tmp_path / 'tokens'}" and "bytes/token" in done.stdout
    run = command("train", *TINY, "data=tokens", f"data.tokens={tmp_path / 'tokens'}", "run.name=x", "training.steps=1")
    assert run.returncode == 0, run.stderr
    assert command("tokenize", *small_corpus, f"out={tmp_path / 'tokens'}").returncode == 2


def test_a_reader_who_goes_away_is_no_traceback():
    process = start(["--help"], Path.cwd())
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == ""


@pytest.fixture
def strangers_folder(tmp_path) -> Path:
    for name in ("core", "data", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package was imported')\n")
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train was run')\n")
    return tmp_path


@pytest.mark.slow
def test_every_verb_works_in_a_folder_with_our_names(strangers_folder, finished, small_corpus, command):
    here = {"cwd": strangers_folder}
    for arguments in (
        ["train", *TINY, *small_corpus, "run.name=x", "training.steps=1"],
        ["train", *TINY, *small_corpus, "run.name=y", "training.steps=1", *TWO_RANKS],
        ["evaluate", f"run={finished}"],
        ["generate", f"run={finished}", "tokens=2"],
        ["tokenize", *small_corpus],
        ["doctor"],
    ):
        done = command(*arguments, real=True, **here)
        assert done.returncode == 0, (arguments[0], done.stderr)
    control = subprocess.run(
        [sys.executable, "-c", "import data"], cwd=strangers_folder, capture_output=True, text=True
    )
    assert "the wrong package was imported" in control.stderr, "control: the folder does shadow us without the guard"


@pytest.mark.slow
def test_python_m_train_survives_a_data_folder(strangers_folder, small_corpus):
    """A user's train.py shadows `-m train` unless PYTHONSAFEPATH=1. A data/ folder never shadows our package."""
    line = [sys.executable, "-m", "train", *TINY, *small_corpus, "run.name=x", "training.steps=1"]
    for safe in ({"PYTHONSAFEPATH": "1"}, {}):
        variables = {**os.environ, **safe}
        done = subprocess.run(line, cwd=strangers_folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (strangers_folder / "train.py").unlink(missing_ok=True)


def test_a_folder_named_by_pythonpath_is_searched_last(strangers_folder, monkeypatch):
    """Its modules are found, and none of its packages shadows ours. Control: not named, it is not searched at all."""
    (strangers_folder / "mine_of_the_folder.py").write_text("")
    monkeypatch.chdir(strangers_folder)
    for named in (True, False):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "elsewhere", *([str(strangers_folder)] * named)]))
        monkeypatch.setattr(sys, "path", ["", str(strangers_folder), *sys.path])
        assert str(PathFinder.find_spec("data").origin).startswith(str(strangers_folder)), "control: it shadows us"
        drop_working_directory()
        assert (PathFinder.find_spec("mine_of_the_folder") is not None) == named
        for name in ("core", "data", "model", "train"):
            assert Path(str(PathFinder.find_spec(name).origin)).parent == ROOT / name


def test_a_foreign_package_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "hparam").mkdir()
    (tmp_path / "hparam" / "__init__.py").write_text("")
    check_packages()
    monkeypatch.delitem(sys.modules, "hparam", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ForeignPackageError, match="the package 'hparam' is not Leviathan's but"):
        check_packages()


@pytest.mark.parametrize("launch", [[], pytest.param(TWO_RANKS, marks=pytest.mark.slow)], ids=["inline", "torchrun"])
def test_ctrl_c_saves_and_exits_130_and_the_run_goes_on(launch, tmp_path, small_corpus, executables):
    arguments, run = [*TINY, *small_corpus, "run.name=x", "training.steps=4000", *launch], tmp_path / "runs" / "x"
    process = start(arguments, tmp_path)
    wait_for(has_step(run, 4), process)
    os.killpg(process.pid, signal.SIGINT)  # as from a terminal: every process of the foreground group gets it
    ended(process, 130)
    log = run / "log.txt"
    assert "interrupted after step" in log.read_text()
    (saved,) = (run / "checkpoints").glob("*/COMMITTED")
    assert saved.parent.name > "step-00000003"
    second = start(arguments, tmp_path, executables)
    wait_for(lambda: f"resuming from {saved.parent.name}" in log.read_text(), second)
    second.kill()
    second.communicate(timeout=240)  # returns when all processes have closed the pipes
    deadline = time.monotonic() + (30 if launch else 1)
    while log.read_text().count("interrupted after step") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    left_behind = log.read_text().count("interrupted after step") - 1
    assert left_behind == (1 if launch else 0), "ranks whose agent died save and stop; a killed process does not"


def test_an_error_of_all_ranks_keeps_its_code_and_is_one_line(command, small_corpus):
    done = command("train", *TINY, *small_corpus, *TWO_RANKS, "model.vocab_size=128")
    told = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(told) == 1 and "the tokenizer has 300 ids" in told[0], done.stderr


@pytest.mark.slow
def test_an_error_of_rank_1_alone_is_reported_by_it(command, small_corpus, tmp_path):
    data = [*small_corpus, f"data.cache={tmp_path / 'cache'}"]
    assert command("tokenize", *data).returncode == 0
    (shard,) = tmp_path.glob("cache/tokens/*/text-held_out-*.bin")  # the second shard: rank 1 hashes it
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    done = command("train", *TINY, *data, *TWO_RANKS)
    told = [line for line in done.stderr.splitlines() if "leviathan: error" in line]
    assert done.returncode == 1 and len(told) == 1 and "rank 1: " in told[0] and shard.name in told[0], done.stderr
