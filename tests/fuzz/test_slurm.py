"""What SLURM prints, and the files of a job: its number, the state of its requeues, the doctor's findings, hangs."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import LeviathanError
from launch.config import seconds
from launch.slurm.job import jobs
from launch.slurm.requeue import bad_nodes, commands, decide, slow_nodes, stored_state
from launch.slurm.submit import parse_status
from tests.fuzz.mutations import assert_reads_or_refuses, files, json_bytes, json_files

STATUS = (
    b"JobId=7 ArrayJobId=7 ArrayTaskId=1,3-6:2%2 JobName=a UserId=me(1) JobState=PENDING Reason=Priority TimeLimit=1:00\n"
    b"JobId=8 ArrayJobId=7 ArrayTaskId=0 JobName=a JobState=RUNNING Reason=None\n"
)


@example(b"ArrayTaskId=0-99999999999 JobState=RUNNING", 3)
@example("ArrayTaskId=\u0661 JobState=RUNNING".encode(), 3)
@given(files(STATUS), st.integers(1, 9))
def test_any_answer_of_scontrol_is_a_status_per_run(content, runs):
    found = assert_reads_or_refuses(lambda: parse_status(content.decode(errors="replace"), runs))
    assert found is not None and len(found) == runs


@example(b"9" * 5000)
@given(st.sampled_from([b"90", b"1:30:00", b"2-00:00:00"]).flatmap(files))
def test_any_time_limit_is_seconds_or_nothing(content):
    found = assert_reads_or_refuses(lambda: seconds(content.decode(errors="replace")))
    assert found is None or found >= 0


@example(json_bytes({"number": "--user=me", "runs": []}))
@example(json_bytes({"number": 17, "runs": "x"}))
@given(json_files({"number": "17", "runs": ["runs/a", "runs/b"], "submitted": 1.5}))
def test_any_file_of_a_job_is_read_or_refused(place, content):
    (place / "jobs" / "a").mkdir(parents=True, exist_ok=True)
    (place / "jobs" / "a" / "job.json").write_bytes(content)
    for job in assert_reads_or_refuses(lambda: jobs(place / "jobs"), LeviathanError) or []:
        assert job.number.isdecimal() and all(str(path).encode() for path in job.runs)


STATE = {"step": 5, "fruitless": 1, "excluded": ["n1"], "slow": ["n2"], "time": 1.5}
HANG = {"time": 2.5, "hosts": ["n3"]}


@example(json_bytes([]), b"{", json_bytes(HANG))
@example(json_bytes({**STATE, "excluded": [1]}), json_bytes({}), json_bytes(HANG))
@example(json_bytes(STATE), json_bytes({"time": 2.0, "bad_nodes": []}), json_bytes({**HANG, "hosts": [None]}))
@given(json_files(STATE), json_files({"time": 2.0, "bad_nodes": ["n4"]}), st.sampled_from([HANG]).flatmap(json_files))
def test_any_state_of_a_job_is_decided_on_or_refused(place, state, findings, hang):
    (place / "doctor").mkdir(exist_ok=True)
    (place / "requeue-0.json").write_bytes(state)
    (place / "doctor" / "findings.json").write_bytes(findings)
    (place / "hangs.jsonl").write_bytes(hang)

    def requeue() -> None:
        before, since = stored_state(place, 0)
        bad, slow = bad_nodes(place / "doctor", place, since), slow_nodes(place / "hangs.jsonl", since)
        now = before.after(7, bad, slow)
        commands("7", decide(1, now, 3, bad, 2, False), now.exclusions(["n0"]), place / "job.sh").encode()

    assert_reads_or_refuses(requeue, LeviathanError)
