"""metrics.jsonl, summary.json and the other lines of a run, as the report and the verbs read them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import ConfigError, DataError
from launch.metap.runs import loss_of
from launch.slurm.submit import _seconds_per_step
from launch.verbs.jobs import _progress
from tests.fuzz.mutations import assert_reads_or_refuses, files, json_bytes, json_files
from tests.support.tiny import config
from train.report.page import _page
from train.report.run import RunData
from train.run_directory import RunDirectory, read_lines, write_config

LOAD = {"max_over_mean": 1.5, "entropy": 0.9, "dead": 0}
STEP = {
    **{"step": 1, "loss": 5.5, "tokens": 384, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 1e3},
    **{"peak_memory_bytes": 10**9, "router_entropy": [0.5, 0.5], "router_z": [1.0, 1.0], "expert_load": [LOAD, LOAD]},
}
HELD_OUT = {"step": 1, "heldout_loss": 5.0, "heldout": {"text": {"loss": 5.0}}}
SUMMARY = {
    **{
        "steps": 2,
        "heldout_loss": 5.0,
        "bigram_loss": 4.0,
        "unigram_loss": 6.0,
        "total_parameters": 9,
        "world_size": 1,
    },
    "heldout": {"bits_per_byte": 2.0, "sources": {"text": {"loss": 5.0}}},
}
WINDOW = {"first_step": 0, "rows": [1, 2, 3]}
LINES = [json_bytes(line) for line in (STEP, {**STEP, "step": 2}, HELD_OUT)]


@pytest.fixture(scope="module")
def run(place):
    made = config(place, "run")
    (place / "run").mkdir()
    write_config(place / "run" / "config.yaml", made)
    with pytest.MonkeyPatch.context() as patch:  # reading it takes a tenth of a second
        patch.setattr("train.report.run.load_config", lambda _: made)
        patch.setattr("launch.slurm.submit.read_config", lambda _: made)
        yield RunDirectory(place / "run")


LOGGED = st.one_of(
    files(b"\n".join(LINES)),
    st.lists(st.sampled_from((STEP, STEP, HELD_OUT, WINDOW)).flatmap(json_files), min_size=1, max_size=3).map(
        b"\n".join
    ),
)


@given(LOGGED)
@example(b"[" * 100_000)
@example(b'{"step": ' + b"9" * 5000 + b"}")
@example(json_bytes({**STEP, "step": "x", "loss": None, "tokens_per_second": {}, "first_step": []}))
def test_any_metrics_are_lines_for_all_who_read_them(run, content):
    run.metrics.write_bytes(content)
    run.online.write_bytes(content)
    run.evaluations.write_bytes(content)
    assert_reads_or_refuses(lambda: list(read_lines(run.metrics)))
    assert_reads_or_refuses(lambda: _progress(run.path))
    assert_reads_or_refuses(lambda: _seconds_per_step(run), ConfigError)
    assert_reads_or_refuses(lambda: run.trim_metrics(1))


@given(LOGGED, json_files(SUMMARY))
@example(json_bytes({**STEP, "expert_load": [LOAD], "router_z": "x"}), json_bytes([]))
@example(json_bytes({**STEP, "gradient_norm": None}), json_bytes(SUMMARY))
@example(json_bytes({**STEP, "step": [], "learning_rate": "x"}), json_bytes({"heldout_loss": 10**400}))
@example(LINES[2].replace(b'"text"', b'"\\ud800"'), json_bytes({"steps": 2, "heldout": {"sources": []}}))
def test_any_run_is_reported_or_refused(run, content, summary):
    run.metrics.write_bytes(content + b"\n" + LINES[1])
    run.summary.write_bytes(summary)
    assert assert_reads_or_refuses(lambda: run.is_summed_up(2)) in (True, False)
    assert_reads_or_refuses(lambda: loss_of(run.path))
    assert_reads_or_refuses(lambda: report(run), ConfigError, DataError)


def report(run: RunDirectory) -> None:
    """Make all of a report but its plots, which take a second."""
    data = RunData(run.path)
    numbers = [
        *data.steps,
        *data.values("loss"),
        *data.values("gradient_norm"),
        *data.values("learning_rate"),
        *data.layer_steps(),
    ]
    numbers += [value for key in (*LOAD, "router_z") for row in data.by_layer(key) for value in row]
    assert all(isinstance(number, int | float) for number in numbers)
    _page([data], [], run.path, None)
