"""The command as a user meets it: other people's folders, torchrun, Ctrl-C, the closing line, every verb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.package_guard import ForeignPackageError, check_packages
from tests.support.tiny import TINY

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_corpus) -> Path:
    """The directory of a short finished run."""
    root = tmp_path_factory.mktemp("runs")
    line = [
        str(BIN / "leviathan"),
        "train",
        *TINY,
        *small_corpus,
        f"run.root={root}",
        "run.name=done",
        "checkpoint.every=3",
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `command` has it: their number changes the rounding
    line.append("evaluation.baselines=true")
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"run: {root / 'done'}"
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
    assert set(last["expert_load"][0]) == {"max_over_mean", "entropy", "dead"}
    assert (finished / "config.yaml").exists() and (finished / "log.txt").exists()


def test_evaluate_repeats_the_runs_own_figure(finished, command):
    done = command("evaluate", f"run={finished}", "sequences=4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == json.loads((finished / "summary.json").read_text())["heldout_loss"]


def test_generate_is_a_function_of_its_seed(finished, command):
    texts = [
        command("generate", f"run={finished}", "prompt='the model'", "tokens=12", f"seed={s}").stdout for s in (0, 0, 1)
    ]
    assert texts[0].startswith("the model") and texts[0] == texts[1] != texts[2]


def test_tokenize_makes_what_data_tokens_takes(command, small_corpus, tmp_path):
    data = [o for o in small_corpus]
    done = command("tokenize", *data, f"out={tmp_path / 'tokens'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"tokens: {tmp_path / 'tokens'}" and "bytes/token" in done.stdout
    run = command("train", *TINY, "data=tokens", f"data.tokens={tmp_path / 'tokens'}", "run.name=x", "training.steps=1")
    assert run.returncode == 0, run.stderr
    assert command("tokenize", *data, f"out={tmp_path / 'tokens'}").returncode == 2


def test_doctor_prints_a_table_and_json(command):
    table, machine = command("doctor"), command("doctor", "json=true")
    assert table.returncode == machine.returncode == 0 and "torch" in table.stdout
    found = json.loads(machine.stdout)
    assert found["packages"]["torch"] and found["problems"] == [] and found["backends"]["gloo"] is True


def test_help_and_cfg(command):
    assert "train" in command("--help").stdout
    text = command("train", "--help", "optimizer.lr=0.25").stdout
    assert "model.hidden_size=128  (int)" in text, "what would run, not the dataclass's default"
    assert "optimizer.lr=0.25  (float)" in text
    assert "data=builtin | files | huggingface | tokens" in text
    assert "training.clip_norm=1.0  (float | null)\n    # Global gradient norm above which" in text
    assert "data.sources.NAME.text_key=text  (str)" in text
    assert "run=???  (str)" in command("evaluate", "--help").stdout
    shown = command("train", "--cfg", "model.hidden_size=256").stdout
    assert "hidden_size: 256" in shown and "vocab_size: 1024" in shown


def test_a_reader_who_goes_away_is_no_traceback():
    process = subprocess.Popen(
        [str(BIN / "leviathan"), "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == ""


@pytest.fixture
def strangers_folder(tmp_path) -> Path:
    """A user's own project whose names are ours."""
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
        ["train", *TINY, *small_corpus, "run.name=y", "training.steps=1", "launch=torchrun", "launch.processes=2"],
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


def test_python_m_train_survives_a_data_folder(strangers_folder, small_corpus):
    """A train.py of the user's own wins against `-m train` unless PYTHONSAFEPATH=1; a data/ folder never does."""
    line = [sys.executable, "-m", "train", *TINY, *small_corpus, "run.name=x", "training.steps=1"]
    safe = subprocess.run(
        line, cwd=strangers_folder, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    assert safe.returncode == 0, safe.stderr
    (strangers_folder / "train.py").unlink()
    plain = subprocess.run(line, cwd=strangers_folder, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr


def test_a_foreign_package_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "hparam").mkdir()
    (tmp_path / "hparam" / "__init__.py").write_text("")
    check_packages()
    monkeypatch.delitem(sys.modules, "hparam", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ForeignPackageError, match="the package 'hparam' is not Leviathan's but"):
        check_packages()


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [str(BIN / "leviathan"), "train", *arguments]
    return subprocess.Popen(
        line,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "launch",
    [[], pytest.param(["launch=torchrun", "launch.processes=2"], marks=pytest.mark.slow)],
    ids=["inline", "torchrun"],
)
def test_ctrl_c_saves_and_exits_130_and_the_run_goes_on(launch, tmp_path, small_corpus, command):
    arguments = [*TINY, *small_corpus, "run.name=x", "training.steps=4000", *launch]
    process = start(arguments, tmp_path)
    metrics, deadline = tmp_path / "runs" / "x" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process of the foreground group gets it
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130, (output[-500:], errors[-2000:])
    log = (tmp_path / "runs" / "x" / "log.txt").read_text()
    assert "interrupted after step" in log
    saved = sorted((tmp_path / "runs" / "x" / "checkpoints").glob("*/COMMITTED"))
    assert len(saved) == 1
    step = int(saved[0].parent.name.removeprefix("step-"))
    assert step > 3
    second = start(arguments, tmp_path)
    while f"resuming from step-{step:08d}" not in (tmp_path / "runs" / "x" / "log.txt").read_text():
        assert second.poll() is None and time.monotonic() < deadline + 120, second.communicate()
        time.sleep(0.05)
    second.kill()
    second.communicate(timeout=240)  # returns when nobody holds the pipes any more
    log, deadline = tmp_path / "runs" / "x" / "log.txt", time.monotonic() + (30 if launch else 1)
    while log.read_text().count("interrupted after step") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    left_behind = log.read_text().count("interrupted after step") - 1
    assert left_behind == (1 if launch else 0), "ranks whose agent died save and stop; a killed process does not"


TWO_RANKS = ["launch=torchrun", "launch.processes=2"]


def test_an_error_of_all_ranks_keeps_its_exit_code_and_is_one_line(command, small_corpus):
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


@pytest.mark.slow
def test_a_rank_that_dies_ends_a_run_without_restarts(small_corpus, tmp_path):
    alone = ["run.name=x", "training.steps=4000", "launch.restarts=0"]
    process = start([*TINY, *small_corpus, *TWO_RANKS, *alone], tmp_path)
    metrics, deadline = tmp_path / "runs" / "x" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    told = [line for line in errors.splitlines() if line.startswith("leviathan: ")]
    assert "was ended by SIGKILL  (its output: " in told[0], errors
    assert told[-1].endswith("x failed; rerun with run.name=x to resume from its last checkpoint")
