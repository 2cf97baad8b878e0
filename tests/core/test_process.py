"""What a process prints and returns when its main function raises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import LeviathanError
from core.exit_codes import AGENT, parent_watch
from core.process import run_process


@pytest.fixture
def ended(capsys, monkeypatch, tmp_path):
    """Return a function that runs `main` as a process does. It returns the exit code and the lines on stderr."""
    monkeypatch.setenv("LEVIATHAN_TRACEBACKS", str(tmp_path / "tracebacks"))

    def run(main) -> tuple[int, list[str]]:
        code = run_process(lambda arguments: main(), [])
        return code, capsys.readouterr().err.splitlines()

    return run


def test_what_the_system_refuses_is_one_line_with_the_path(ended, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, mode, reason in (
        (tmp_path / "none", "r", "no such file or folder"),
        (tmp_path, "w", "is a folder, but must be a file"),
        (tmp_path / "file" / "x", "w", "a part of this path is a file, but must be a folder"),
        (tmp_path / "loop", "r", "its symbolic links form a loop"),
        (tmp_path / ("x" * 300), "w", "the name is too long; choose a shorter one"),
        (Path("/proc/version"), "w", "permission denied"),
        (Path("/dev/full"), "w", "no space is left on the disk"),
    ):

        def act(path=path, mode=mode):
            with open(path, mode) as file:
                file.write("x") if mode == "w" else file.read()
            raise AssertionError

        if path == Path("/dev/full"):
            code, lines = ended(act)
            assert lines == [f"leviathan: error: {reason}; free some, or write elsewhere"]
        elif path == Path("/proc/version") and os.geteuid() == 0:
            continue  # root may do everything
        else:
            code, lines = ended(act)
            assert len(lines) == 1 and lines[0].startswith(f"leviathan: error: {path}: {reason}")
        assert code == 1


def test_what_was_not_foreseen_keeps_its_traceback_in_a_file(ended, tmp_path, monkeypatch):
    def act():
        raise KeyError("first\nsecond")

    for folder in (tmp_path / "tracebacks", None):
        code, (line,) = ended(act)
        assert code == 1 and line.startswith(
            r"leviathan: error: internal error, KeyError: 'first\nsecond'; please report"
        )
        path = Path(line.rpartition(" ")[2])
        assert folder is None or path.parent == folder
        text = path.read_text()
        assert "Traceback (most recent call last):" in text and 'raise KeyError("first\\nsecond")' in text
        monkeypatch.setenv("LEVIATHAN_TRACEBACKS", "/dev/null/x")
        monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_expected_errors_keep_their_codes(ended):
    def refuse():
        raise LeviathanError("this is wrong")

    def interrupt():
        raise KeyboardInterrupt

    def starve():
        raise MemoryError

    assert ended(refuse) == (1, ["leviathan: error: this is wrong"])
    assert ended(interrupt) == (130, ["leviathan: interrupted"])
    assert ended(starve)[1] == [
        "leviathan: error: this machine has not enough memory: use smaller sizes, or more machines"
    ]


@pytest.mark.parametrize("rank, everywhere, lines", [("0", True, 1), ("1", True, 0), ("1", False, 1)])
def test_an_error_of_all_ranks_is_printed_by_the_first(ended, monkeypatch, rank, everywhere, lines):
    def refuse():
        error = LeviathanError("this is wrong")
        error.everywhere = everywhere
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = ended(refuse)
    assert code == 1 and len(said) == lines


def run_in(shell: str, cwd: Path) -> tuple[int, str]:
    command = [sys.executable, "-c", "from launch.cli import main; raise SystemExit(main(['--help']))"]
    script = f"{shell.replace('COMMAND', subprocess.list2cmdline(command))}"
    done = subprocess.run(["bash", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_full_standard_output_is_one_line(tmp_path):
    code, errors = run_in("COMMAND > /dev/full", tmp_path)
    assert code == 1 and errors == "leviathan: error: no space is left on the disk; free some, or write elsewhere\n"


def test_a_working_directory_that_is_gone_is_one_line(tmp_path):
    code, errors = run_in("mkdir gone; cd gone; rmdir ../gone; COMMAND", tmp_path)
    assert code == 1
    assert errors.endswith("leviathan: error: the working directory no longer exists: change to another one (cd)\n")


RANK = """
import atexit, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from core.process import end_process

rank, ready = int(os.environ["RANK"]), Path("ready")
dist.init_process_group("gloo", store=dist.FileStore("store", 2), rank=rank, world_size=2)

def compute():
    ready.touch()
    sys.setswitchinterval(1000)  # a thread that asks for the interpreter's lock gets it only after this function
    begun = time.monotonic()
    while time.monotonic() - begun < 1:
        pass

if rank:
    while not ready.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(3))
    os._exit(0)
atexit.register(compute)
dist.all_reduce(torch.ones(3), async_op=True)  # gloo's thread frees the tensor while the process ends
{end}(0)
"""


@pytest.mark.parametrize("end, code", [("end_process", 0), ("sys.exit", -signal.SIGABRT)], ids=["ours", "control"])
def test_a_rank_ends_although_gloo_frees_a_tensor(tmp_path, end, code):
    ranks = []
    for rank in "01":
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", RANK.replace("{end}", end)]
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE))
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert ranks[0].returncode == code, errors


def test_a_rank_flushes_and_runs_its_exit_handlers(tmp_path):
    script = "import atexit; from core.process import end_process; atexit.register(print, 'handler'); end_process(7)"
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "handler\n")


def test_an_agent_that_ended_before_its_rank_began_is_noticed(monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for agent, has_ended in ((ended.pid, True), (os.getpid(), False), ("9" * 30, False), ("x", False), ("", False)):
        monkeypatch.setenv(AGENT, str(agent))
        assert parent_watch()() is has_ended, agent
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv(AGENT, str(ended.pid))
    assert parent_watch()() is False, "not a rank"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_their_numbers_stay_free(tmp_path, closed):
    """Else the first file that a run opens is its standard output."""
    script = (
        "import os, sys\nfrom core.process import run_process\n"
        "def act(arguments):\n    print('said'); print('told', file=sys.stderr)\n"
        "    with open('file', 'w') as file:\n        assert file.fileno() > 2, file.fileno()\n    return 0\n"
        "raise SystemExit(run_process(act, []))"
    )
    line = f"exec {subprocess.list2cmdline([sys.executable])} -c '{script.replace(chr(39), chr(34))}' {closed}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == ""


def test_progress_goes_on_without_a_standard_output(tmp_path):
    command = f'exec {sys.executable} -c \'from core.process import say; say("a"); say("b")\' > /dev/full'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "standard output cannot be written: later lines are not shown\n"


def test_what_the_locale_lacks_is_escaped(tmp_path):
    script = (
        "from core.process import run_process; raise SystemExit(run_process(lambda words: print('\\u65e5') or 0, []))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\\u65e5\n"), done.stderr
