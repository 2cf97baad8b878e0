"""Environment variables that hold what they cannot: one line, or no effect."""

from __future__ import annotations

import zlib

import pytest

from tests.launch.hostile.damage import fault, wrong
from tests.support.tiny import TINY

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"),
    *("SLURM_PROCID", "SLURM_NTASKS", "OMP_NUM_THREADS", "LEVIATHAN_TRACEBACKS", "LEVIATHAN_ATTEMPT"),
    *("HYDRA_FULL_ERROR", "HF_HOME", "WANDB_MODE", "CUDA_VISIBLE_DEVICES", "COLUMNS", "LANG", "TZ"),
    *("TORCH_CPP_LOG_LEVEL", "XDG_CACHE_HOME", "HOME", "TMPDIR", "USER", "PATH"),
)
VALUES = ("", "-1", "abc", "1.5", "9" * 21, "é", "/proc/nowhere/x", "/dev/null", "0", "3", "nan", " 1 ")
PAIRS = [
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "no.such.host", "MASTER_PORT": "29511"},
]
CASES = [*({name: value} for name in VARIABLES for value in VALUES), *PAIRS]


@pytest.fixture
def outcome(command, finished, small_corpus, tmp_path):
    """Return a function that runs verbs with variables and returns what is wrong with their ends."""

    def run(variables: dict[str, str]) -> str:
        short = ["training.steps=1", "evaluation.sequences=1", "run.resume=true"]
        root = tmp_path / str(zlib.crc32(str(variables).encode()))
        train = command(
            "train", *TINY, *small_corpus, *short, f"run.root={root}", "run.name=x", timeout_s=60, **variables
        )
        report = command("report", str(finished), timeout_s=60, **variables)
        silent = train.returncode == 0 and not (root / "x" / "summary.json").exists()
        return fault(train) or fault(report) or ("trains nothing, and says nothing" if silent else "")

    return run


def test_some_odd_variables_end_in_one_line(outcome):
    some: list[dict[str, str]] = [{"RANK": "3"}, {"LOCAL_WORLD_SIZE": "0"}, {"MASTER_PORT": "abc"}]
    assert wrong((one, outcome(one)) for one in some) == []


@pytest.mark.slow
def test_every_odd_variable_ends_in_one_line(outcome):
    assert wrong((one, outcome(one)) for one in CASES) == []
