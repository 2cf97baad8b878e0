"""Test submission, requeueing and rejections, with stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from core.config import build, groups, load
from core.exit_codes import host_name
from core.overrides import expand
from launch import agent
from launch.cli import main
from launch.config import LaunchConfig, seconds
from launch.slurm import job_step, requeue
from launch.slurm.job import SlurmJob, load_job
from launch.slurm.job_step import CANCELLED, FAILED_NODE, FINAL, WARNED, code_for
from launch.slurm.requeue import AGAIN, RequeueDecision, RequeueState, bad_nodes, commands, decide, slow_nodes
from launch.slurm.submit import SILENT, UNKNOWN, JobStatus, ask, follow, parse_status, render
from train.config import TrainConfig
from train.environment import environment
from train.run_directory import write_config

GOLDEN = Path(__file__).parent / "golden"


def test_the_script_asks_for_what_was_configured():
    slurm = yaml.safe_load((GOLDEN / "slurm.yaml").read_text())
    launch = build(LaunchConfig, {"kind": "slurm", "nodes": 4, "processes": 8, "slurm": slurm})
    job = SlurmJob(Path("/jobs/big"), "", [Path(f"/runs/big-{i}") for i in range(4)])
    assert render(job, launch, Path("/home/me")) == (GOLDEN / "job.sh").read_text()


def test_what_is_not_configured_is_not_asked_for():
    launch = build(LaunchConfig, {"kind": "slurm", "processes": 8})
    lines = render(SlurmJob(Path("/jobs/x"), "", [Path("/runs/x")]), launch, Path("/a b")).splitlines()
    asked = [line.split("--")[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert asked == ["job-name", "nodes", "ntasks-per-node", "chdir", "output", "open-mode", "signal", "requeue"]
    assert "#SBATCH --chdir='/a b'" in lines
    assert any(line.endswith(f'{sys.executable} -u -m launch.slurm.job_step "$1" /jobs/x &') for line in lines)
    assert "step train" in lines and "step doctor" not in lines


def test_times_are_read_as_sbatch_does():
    wanted = {"90": 5400, "1:30": 90, "1:30:00": 5400, "2-0": 172800, "1-2:30": 95400, "0-0:0:5": 5, "soon": None}
    assert {text: seconds(text) for text in wanted} == wanted


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands, each a shell script of one line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def put(**lines: str) -> None:
        for name, line in lines.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)

    waiting = "echo JobId=17 ArrayJobId=17 ArrayTaskId=1-3%2 JobName=x JobState=PENDING Reason=JobArrayTaskLimit"
    running = "echo JobId=18 ArrayJobId=17 ArrayTaskId=0 JobName=x JobState=RUNNING Reason=None"
    put(sbatch="echo 17", sinfo="printf 'main\\ngpu\\n'", scontrol=f"{waiting}\n{running}\necho $4 >> {tmp_path}/asked")
    return put


SUBMIT = ["train", "run.name=x", "launch=slurm", "launch.processes=1", "launch.slurm.follow=false"]


def test_a_job_keeps_what_was_submitted(stand_ins, tmp_path, capsys):
    assert main([*SUBMIT, "optimizer.lr=1e-3,2e-3"]) == 0
    assert not (tmp_path / "asked").exists()
    assert "job 17: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "jobs" / "x" / "job.json").read_text())
    assert stored["number"] == "17" and [Path(run).name for run in stored["runs"]] == ["x-0", "x-1"]
    assert "#SBATCH --array=0-1\n" in (tmp_path / "jobs" / "x" / "job.sh").read_text()
    assert "lr: 0.002" in (tmp_path / "jobs" / "x" / "config-1.yaml").read_text()
    assert main(["jobs"]) == 0
    listed = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == [["17_0", "x-0", "RUNNING"], ["17_1", "x-1", "PENDING"]]
    assert (tmp_path / "asked").read_text().split() == ["17"], "one scontrol call for all runs of a job"


def test_files_that_are_not_of_a_job_are_kept(stand_ins, tmp_path, capsys):
    folder = tmp_path / "jobs" / "x"
    folder.mkdir(parents=True)
    for name in ("log-book.txt", "config-1.yaml"):
        (folder / name).write_text("mine")
    assert main([*SUBMIT, "launch.slurm.submit=false"]) == 2
    assert "holds files that are not of a job; choose another name" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["config-1.yaml", "log-book.txt"]
    (folder / "config-1.yaml").unlink()
    (folder / "log-book.txt").rename(tmp_path / "log-book.txt")
    assert main([*SUBMIT, "launch.slurm.submit=false"]) == 0
    (tmp_path / "log-book.txt").rename(folder / "log-book.txt")
    (folder / "log-3.txt").write_text("of the job before")
    assert main([*SUBMIT, "launch.slurm.submit=false"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config-0.yaml", "job.sh", "log-book.txt"]


def test_a_slurm_that_does_not_answer_is_told(stand_ins, capsys):
    assert main(SUBMIT) == 0
    stand_ins(scontrol="echo no controller >&2; exit 1")
    assert main(["jobs"]) == 1 and "SILENT" in capsys.readouterr().out
    assert main(["jobs", "show", "x"]) == 1
    assert "SLURM does not answer about job 17; its log: " in capsys.readouterr().err


def test_a_word_of_the_script_is_one_line(stand_ins, refused, tmp_path):
    for key, value in {"partition": "'a\n#SBATCH --uid=0'", "options": "['--x', 'a\n--y']"}.items():
        assert "must be one line" in refused(*SUBMIT, f"launch.slurm.{key}={value}")
    assert not (tmp_path / "jobs").exists()


def test_a_followed_job_is_one_question_a_look(stand_ins, tmp_path, capsys):
    """`follow` asks four times about two runs, and SLURM's answer may lack a run that has ended."""
    assert main([*SUBMIT, "optimizer.lr=1e-3,2e-3"]) == 0
    job, shown = load_job(tmp_path / "jobs" / "x"), []
    job.log(1).write_text("step 1\n")
    answers = [
        "JobId=17 ArrayTaskId=0-1 JobState=PENDING Reason=Resources",
        "JobId=17 ArrayTaskId=1 JobState=PENDING Reason=None\nJobId=18 ArrayTaskId=0 JobState=RUNNING Reason=None",
        "JobId=17 ArrayTaskId=1 JobState=RUNNING Reason=None\nJobId=18 ArrayTaskId=0 JobState=COMPLETED Reason=None",
        "JobId=17 ArrayTaskId=1 JobState=FAILED Reason=NonZeroExitCode",
    ]
    for number, answer in enumerate(answers):
        (tmp_path / f"answer-{number}").write_text(answer + "\n")
    asked = tmp_path / "asked"
    stand_ins(scontrol=f"echo $4 >> {asked}\ncat {tmp_path}/answer-$(($(wc -l < {asked}) - 1))")
    assert follow(job, shown.append, poll_s=0.0) == 1
    assert asked.read_text().split() == ["17"] * 4
    assert shown[:3] == ["[17_0] PENDING (Resources)", "[17_1] step 1", "[17_1] PENDING (Resources)"]
    assert shown[3:6] == ["[17_0] RUNNING", "[17_0] COMPLETED", "[17_1] RUNNING"]
    assert shown[6:8] == ["[17_0] UNKNOWN", "[17_1] FAILED"]
    assert shown[8:] == [f"[17_0] left no log in {job.folder}: is it on a file system that the nodes share?"]


def test_lines_of_an_array_are_understood():
    wanted = {"0-4": "AAAAA", "1,3-4%2": "-A-AA", "0-4:2": "A-A-A", "7": "-----", "...": "-----"}
    for tasks, states in wanted.items():
        told = parse_status(f"JobId=1 ArrayTaskId={tasks} JobState=A", 5)
        assert "".join("-" if one.state == UNKNOWN else one.state for one in told) == states, tasks
    assert parse_status("JobId=1 JobState=A", 1) == [JobStatus("A")] and parse_status("", 1) == [JobStatus(UNKNOWN)]


def test_silent_and_unknown_are_told_apart(stand_ins):
    job = SlurmJob(Path("/jobs/x"), "17", [Path("/runs/x")])
    stand_ins(scontrol="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert ask(job) == [JobStatus(SILENT)]
    stand_ins(scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert ask(job) == [JobStatus(UNKNOWN)]


def test_what_slurm_rejects_is_one_line(stand_ins, refused, capsys):
    partition = "launch.slurm.partition=gpus"
    assert refused(*SUBMIT, partition) == f"{partition}: no such partition; try gpu or main"
    assert "y is neither a job number nor a job in" in refused(*SUBMIT, "launch.slurm.dependency=afterok:y")
    assert main(SUBMIT) == 0
    assert refused(*SUBMIT) == "run.name=x: job 17 of that name has not ended; try another name"
    assert refused("jobs", "show", "nobody") == "job=nobody: no such job was submitted from here; try x"
    stand_ins(scontrol="echo JobId=17 JobState=FAILED Reason=None")
    assert main(["jobs", "show", "x"]) == 1
    assert "left no log in" in capsys.readouterr().out
    stand_ins(sbatch="[ $1 = --version ] || { echo 'sbatch: error: submission failed: Invalid account' >&2; exit 1; }")
    reason = "the job was rejected: sbatch: error: submission failed: Invalid account"
    assert reason in refused(*SUBMIT, "run.name=y")


@pytest.mark.parametrize("every, code", [(38, 2), (37, 0)])
def test_a_time_limit_below_a_checkpoint_interval_is_rejected(stand_ins, tmp_path, capsys, every, code):
    """At 4,096 tokens per step and 512 per second, 38 steps take 304 s. Five of the ten minutes are for saving."""
    overrides = ["run.name=x", f"checkpoint.every={every}", "training.global_batch_size=16", "training.seq_len=256"]
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    write_config(run / "config.yaml", load("train", TrainConfig, overrides))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 5.0, "tokens_per_second": 512.0}) + "\n")
    assert main([*SUBMIT, *overrides, "launch.slurm.time=10"]) == code
    reason = "takes 304 s at 8.00 s per step, too long for launch.slurm.time=10; try 37"
    assert capsys.readouterr().err == (f"leviathan: error: checkpoint.every=38: {reason}\n" if code else "")


@pytest.mark.parametrize("given, where, code, lines", [(3, 0, FINAL + 2, 1), (3, 1, FINAL + 2, 0), (2, 0, 0, 0)])
def test_a_job_with_another_number_of_nodes_ends(tmp_path, monkeypatch, capsys, given, where, code, lines):
    """Only the first node prints the error. With the right number of nodes, the ranks are started."""
    launch = {"kind": "slurm", "nodes": 2, "processes": 1}
    write_config(tmp_path / "config-0.yaml", replace(load("train", TrainConfig, ["run.name=x"]), launch=launch))
    job = {"JOB_ID": 17, "JOB_NUM_NODES": given, "NODEID": where, "LAUNCH_NODE_IPADDR": "::1"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    started = []
    monkeypatch.setattr(agent, "run", lambda node: started.append(node) or 0)
    assert job_step.main(["train", str(tmp_path)]) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == lines and all("launch.nodes=2: SLURM allocated 3 nodes: " in line for line in told), told
    assert [one.nodes for one in started] == ([] if code else [2])


def test_a_machine_has_one_name_everywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert job_step.main(["train", str(tmp_path / "no")]) == FINAL + 2
    assert capsys.readouterr().err.startswith(f"leviathan: error: n7 does not see {tmp_path / 'no'}: ")
    assert environment()["host"] == host_name() == "n7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert environment()["host"] == host_name() == os.uname().nodename


REQUEUED = [(code, 60, ()) for code in (WARNED, 128 + signal.SIGUSR1, CANCELLED, 128 + signal.SIGTERM, 137)]
REQUEUED += [(3, 40, ("n2",)), (FAILED_NODE, 40, ("n2",))]
ENDS = [(0, 40, (), 0), (WARNED, 40, (), 1), (FAILED_NODE, 40, ("n1", "n2"), 1)]
ENDS += [(FINAL + code, 60, (), code) for code in (1, 2)]


@pytest.mark.parametrize("code, step, bad, wanted", [*ENDS, *((*case, AGAIN) for case in REQUEUED)])
def test_when_a_job_is_requeued(code, step, bad, wanted):
    now = RequeueState(40, 2, ("n7",)).after(step, bad)
    assert now.fruitless == (0 if step > 40 else 3) and now.excluded == tuple(sorted(("n7", *bad)))
    decision = decide(code, now, 3, bad, 2, cancelled=False)
    assert decision.exit_code == wanted, decision.why
    stopped = code in (CANCELLED, 128 + signal.SIGTERM)
    assert decision.if_running == stopped, "a job that the user cancelled is not requeued"
    assert decide(code, now, 3, bad, 2, cancelled=True).cancel == bool(code)


def test_a_job_without_progress_ends():
    cases = {(40, 3, 40, 3): 1, (40, 3, 41, 3): AGAIN, (-1, 0, -1, 3): AGAIN, (-1, 0, -1, 0): 1}
    for (before, fruitless, step, retries), wanted in cases.items():
        now = RequeueState(before, fruitless).after(step, ())
        assert decide(3, now, retries, (), 2, False).exit_code == wanted, (before, step, retries)


def test_the_commands_that_requeue_a_job():
    def lines(job: str, **decision: bool) -> list[str]:
        return commands(job, RequeueDecision(AGAIN, "", **decision), [], Path("/jobs/x/job.sh")).splitlines()

    again = ["scontrol requeue 17_2 || exit 1", "scontrol update JobId=17_2 StartTime=now"]
    assert lines("17_2") == ["trap '' TERM", *again]
    assert lines("17", cancel=True)[1:] == ["scancel 17", "exit 130"]
    is_running = "scontrol show job -o 17_2 | grep -q JobState=RUNNING || exit 130"
    assert lines("17_2", if_running=True) == ["trap '' TERM", is_running, *again]


@pytest.mark.parametrize("possible, excluded", [("n1,n2,n3 n1,n2", "n1,n2,n3"), ("n1,n2", "n1,n2"), ("", None)])
def test_nodes_are_excluded_only_where_enough_stay(stand_ins, tmp_path, possible, excluded):
    """If too few nodes stay, the slow n3 is used again before n1 and n2, which are faulty."""
    stand_ins(
        sbatch=f'for list in {possible}; do [ "$2" != --exclude=$list ] || exit 0; done; echo too few >&2; exit 1',
        scontrol=f'echo "$@" >> {tmp_path}/asked',
    )
    exclusions = [["n1", "n2", "n3"], ["n1", "n2"]]
    lines = commands("17", RequeueDecision(AGAIN, ""), exclusions, tmp_path / "job.sh")
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True)
    told = [] if excluded == "n1,n2,n3" else ["leviathan: cannot exclude all of n1,n2,n3: SLURM: too few"]
    wanted = ["requeue 17", "update JobId=17 StartTime=now"]
    if excluded:
        told.append(f"leviathan: excluded from now on: {excluded}")
        wanted.append(f"update JobId=17 ExcNodeList={excluded}")
    assert done.stdout.splitlines() == told and not done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == wanted


def test_which_nodes_to_exclude():
    now = RequeueState(40, 0, ("n1",), ("n2",)).after(60, ("n2", "n4"), ("n3", "n1"))
    assert (now.excluded, now.slow) == (("n1", "n2", "n4"), ("n3",)), "a faulty node is not listed as slow"
    assert now.exclusions(["n0"]) == [["n0", "n1", "n2", "n3", "n4"], ["n0", "n1", "n2", "n4"]]
    assert RequeueState().exclusions(["n0"]) == [] and RequeueState(excluded=("n0",)).exclusions(["n0"]) == []
    assert RequeueState(excluded=("n1",)).exclusions([]) == [["n1"]] == RequeueState(slow=("n1",)).exclusions([])


@pytest.mark.parametrize("code, wished", [(WARNED, ["n2"]), (3, ["n2", "n3", "n4"]), (0, None)])
def test_a_requeued_job_excludes_slow_nodes(stand_ins, tmp_path, monkeypatch, capsys, code, wished):
    """Exclude slow nodes whenever the job is requeued, and nodes that hung only if the attempt failed."""
    assert main(SUBMIT) == 0
    logs = tmp_path / "runs" / "x" / "logs"
    logs.mkdir(parents=True)
    later = time.time() + 1
    (logs / "slow.jsonl").write_text(json.dumps({"time": later, "step": 9, "hosts": ["n2"]}) + "\n")
    (logs / "hangs.jsonl").write_text(json.dumps({"time": later, "hosts": ["n3"]}) + "\n")
    (logs / "corrupt.jsonl").write_text(json.dumps({"time": later, "hosts": ["n4"]}) + "\n")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    again = tmp_path / "jobs" / "x" / "again-0.sh"
    assert requeue.main([str(tmp_path / "jobs" / "x"), str(code)]) == (0 if code == 0 else AGAIN)
    assert again.exists() == bool(code)
    if code:
        assert f"for nodes in {','.join(wished)} " in again.read_text()
        assert "leviathan: slow until the end of this attempt: n2" in capsys.readouterr().out
        stored = json.loads((tmp_path / "jobs" / "x" / "requeue-0.json").read_text())
        assert stored["slow"] == ["n2"] and stored["excluded"] == ([] if code == WARNED else ["n3", "n4"])


def test_bad_and_slow_nodes_are_those_of_this_attempt(tmp_path):
    """A line that a rank had no time to complete is skipped."""
    hangs, slow = tmp_path / "hangs.jsonl", tmp_path / "slow.jsonl"
    lines = '{"time": 10.0, "hosts": ["old"]}\n{"time": 30.0, "hosts": ["n2"]}\n'
    for path in (hangs, slow):
        path.write_text(lines + '{"time": 31.0, "ho')
    (tmp_path / "findings.json").write_text(json.dumps({"time": 30.0, "bad_nodes": ["n3"]}))
    assert bad_nodes(tmp_path, tmp_path, 20.0) == ("n2", "n3") and slow_nodes(slow, 20.0) == ("n2",)
    assert bad_nodes(tmp_path, tmp_path, 40.0) == () == slow_nodes(slow, 40.0)
    assert bad_nodes(tmp_path / "no", tmp_path / "no", 0.0) == () == slow_nodes(tmp_path / "no", 0.0)
    slow.write_text(lines + '{"time": 40.0, "hosts": []}\n')
    assert slow_nodes(slow, 20.0) == (), "a node that recovered is not slow"


def test_codes_of_ranks_say_whether_to_try_again():
    wanted = {0: 0, 1: FINAL + 1, 2: FINAL + 2, 3: 3, 4: 3, 130: WARNED, 255: 3, FAILED_NODE: FAILED_NODE}
    assert {code: code_for(code) for code in wanted} == wanted


def test_a_sweep_is_every_combination():
    assert expand(["a=1,2", "b=x", "c=range(0,2)", "d=[1,2]"], groups()) == [
        [f"a={a}", "b=x", f"c={c}", "d=[1,2]"] for a in (1, 2) for c in (0, 1)
    ]
    assert expand(["a="], groups()) == [["a="]]
