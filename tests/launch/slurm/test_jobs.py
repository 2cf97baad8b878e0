"""Jobs on a real SLURM: after a disturbance they resume by themselves, with the same losses bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.test_command import BIN
from tests.support.fakes.slurm_cluster import SMOKE, STEPS, TWO_NODES, User
from tests.test_docs import ROOT, blocks, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def user(cluster, tmp_path_factory) -> Iterator[User]:
    yield User(cluster, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def undisturbed(user) -> tuple[dict[int, tuple[float, float]], float]:
    """Return every loss and norm of an undisturbed two-node job, and its held-out loss."""
    number = user.submit("calm")
    assert "resuming from" not in user.ended("calm", number)
    found = user.results("calm")
    assert sorted(found[0]) == list(range(1, STEPS + 1)) and found[0][STEPS][0] < found[0][1][0] - 1
    return found


@pytest.mark.parametrize("warning", ["USR1", "TERM"])
def test_a_warned_job_saves_and_resumes(cluster, user, undisturbed, warning):
    """SLURM sends USR1 before the time limit, and TERM to a job that it preempts."""
    name = f"warned-{warning}"
    number = user.submit(name, until=25)
    cluster.client("scancel", f"--signal={warning}", number)
    log = user.ended(name, number)
    assert user.results(name) == undisturbed
    assert "interrupted after step" in log and "requeued to resume from step" in log
    assert log.count("resuming from step-") == 1


def test_a_preempted_job_saves_and_resumes(cluster, user, undisturbed):
    """SLURM sends TERM, and would kill and requeue the job a minute later. The job requeues itself before."""
    number = user.submit("humble", until=25)
    urgent = ["--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    other = cluster.client("sbatch", *urgent).strip()
    cluster.wait(lambda: user.state(other) == "RUNNING", "preemption", 240)
    assert user.state(number) == "PENDING"
    log = user.ended("humble", number)
    assert user.state(other) == "COMPLETED"
    assert user.results("humble") == undisturbed
    assert "interrupted after step" in log and "stopped from outside; requeued to resume from step" in log
    assert log.count("resuming from step-") == 1


@pytest.mark.parametrize("what", ["daemon", "node"])
def test_a_dead_node_is_replaced_and_a_dead_daemon_ignored(cluster, user, undisturbed, what):
    name = f"without-{what}"
    number = user.submit(name, until=25)
    victim = user.nodes_of(number)[1]
    (cluster.kill_daemon if what == "daemon" else cluster.kill_node)(victim)
    try:
        user.ended(name, number)
    finally:
        cluster.start_node(victim)
    assert user.results(name) == undisturbed
    assert user.log(name).count("resuming from step-00000020") == (what == "node")


def test_a_killed_step_leaves_no_rank(cluster, user, undisturbed):
    number = user.submit("orphans", until=5)
    node, ranks = user.nodes_of(number)[1], b"\0train\0--config\0"
    assert cluster.processes(node, ranks)
    for pid in cluster.processes(node, b"\0launch.slurm.job_step\0train"):
        os.kill(pid, signal.SIGKILL)
    cluster.wait(lambda: not cluster.processes(node, ranks), "end of the ranks", 10)
    user.ended("orphans", number)
    assert user.results("orphans") == undisturbed


def test_a_hanging_node_is_named_and_excluded(cluster, user, undisturbed):
    """The ranks of the first node are stopped and have no restarts left: the job continues on other nodes."""
    number = user.submit("stuck", "parallel.timeout_s=5", "launch.restarts=0", until=25)
    victim = user.nodes_of(number)[0]
    cluster.stop_ranks(victim)
    log = user.ended("stuck", number)
    assert user.results("stuck") == undisturbed
    assert "has sent no heartbeat since step" in log and f"on {victim})" in log
    assert f"leviathan: excluded from now on: {victim}" in log and "resuming from step-00000020" in log
    assert f"ExcNodeList={victim} " in cluster.client("scontrol", "show", "job", "-o", number)
    assert victim not in user.nodes_of(number)


SLOW = """
import os
if "RANK" in os.environ:
    from train import stragglers
    stragglers.LEAST_S = 0.1  # nothing but what is made slow here
    honest, late = stragglers.Stragglers.probe, 0.5 * (os.environ["SLURMD_NODENAME"] == "n1")
    stragglers.Stragglers.probe = lambda self: honest(self) + late
"""


@pytest.mark.parametrize("enough", [True, False])
def test_a_slow_node_is_excluded_where_enough_stay(cluster, user, tmp_path, enough):
    """Matmuls are slow on n1. It is excluded, unless n3 already is: the job needs two of the three nodes."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    name = f"limping-{enough}"
    usable = [] if enough else ["launch.slurm.exclude=[n3]"]
    path = [f"+launch.slurm.environment.PYTHONPATH={tmp_path}"]
    number = user.submit(name, "training.steps=40", *usable, *path, until=5)
    assert "n1" in user.nodes_of(number), "SLURM takes the first nodes that are idle"
    cluster.client("scancel", "--signal=USR1", number)
    log = user.ended(name, number)
    assert "leviathan: slow until the end of this attempt: n1\n" in log and log.count("resuming from step-") == 1
    assert ("leviathan: excluded from now on: n1\n" in log) == enough
    kept = "leviathan: cannot exclude all of n1,n3: SLURM: allocation failure: Requested node configuration"
    assert (kept in log) == (not enough)
    assert ("n1" in user.nodes_of(number)) == (not enough)


@pytest.mark.parametrize("dies", ["always", "once"])
def test_a_job_whose_ranks_keep_dying_is_given_up(user, tmp_path, dies):
    """The ranks kill themselves before their first step, in each attempt or, as a control, only in the first."""
    when = "True" if dies == "always" else "'SLURM_RESTART_COUNT' not in os.environ"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, signal\nif 'RANK' in os.environ and {when}:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dying = ["launch.restarts=1", "launch.slurm.requeues=1", f"+launch.slurm.environment.PYTHONPATH={tmp_path}"]
    number = user.submit(f"dies-{dies}", "training.steps=3", *dying)
    log = user.ended(f"dies-{dies}", number, "FAILED" if dies == "always" else "COMPLETED")
    assert "was ended by SIGKILL" in log and "restarting the ranks; restarts left: 1" in log
    assert log.count("leviathan: failed (3); requeued to resume from its newest checkpoint") == 1
    given_up = "leviathan: not requeued: 2 attempts in a row reached no new checkpoint"
    assert log.count(given_up) == (dies == "always"), log


def test_a_container_command_goes_before_python_on_each_node(cluster, user, tmp_path):
    """A script stands in for the container runtime. The ranks must run inside what it starts."""
    runtime, marks = tmp_path / "runtime", tmp_path / "marks"
    runtime.write_text(
        f'#!/bin/bash\n[ "$1 $2" = "exec image.sif" ] || exit 64\nshift 2\necho "$SLURMD_NODENAME $4 $5" >> {marks}\n'
        'export OMP_STACKSIZE=7M\nexec "$@"\n'
    )
    runtime.chmod(0o755)
    number = user.submit("boxed", "training.steps=3", f"launch.slurm.container='{runtime} exec image.sif'")
    user.ended("boxed", number)
    nodes = user.nodes_of(number)
    lines = marks.read_text().splitlines()
    trained = [f"{node} launch.slurm.job_step train" for node in nodes]
    assert sorted(line for line in lines if "train" in line) == trained, lines
    assert len(lines) == 3 and lines[2].startswith(f"{nodes[0]} "), "and once at the end of the job"
    environment = json.loads((user.home / "runs" / "boxed" / "environment.json").read_text())
    assert environment["variables"]["OMP_STACKSIZE"] == "7M"


def test_the_time_limit_is_no_end(user, undisturbed):
    """The limit is two minutes, one of them for saving. With an evaluation at every step, the run takes longer."""
    number = user.submit("short", "launch.slurm.time=2", "evaluation.every=1", "evaluation.sequences=12")
    log = user.ended("short", number, seconds=600)
    assert user.figures("short") == undisturbed[0]
    assert 1 <= log.count("leviathan: requeued to resume from step") == log.count("resuming from step-")


def test_a_script_submitted_by_hand_is_known(cluster, user, tmp_path):
    """It runs in the folder in which it was written."""
    assert "written, not submitted" in user.leviathan("train", *user.job("later"), "launch.slurm.submit=false").stdout
    assert user.leviathan("jobs", "show", "later").returncode == 2
    script = str(user.home / "jobs" / "later" / "job.sh")
    number = cluster.client("sbatch", "--parsable", script).strip()
    user.ended("later", number)
    assert (user.home / "runs" / "later" / "summary.json").exists()
    assert number in user.leviathan("jobs").stdout


def test_an_array_job_is_a_sweep_and_is_laid_side_by_side(cluster, user):
    rates = (0.001, 0.002, 0.004, 0.008)
    one_node = ["launch.nodes=1", "launch.slurm.cpus=1", "launch.slurm.memory=2000", "parallel.ep=1"]
    number = user.submit("sweep", *one_node, "training.steps=10", f"optimizer.lr={','.join(map(str, rates))}")
    user.reach("sweep-1", 2)
    cluster.client("scancel", "--signal=USR1", f"{number}_1")
    for task in range(4):
        user.ended("sweep", f"{number}_{task}")
    again = ["requeued" in user.log("sweep", task) for task in range(4)]
    assert again == [False, True, False, False], "only the warned task is requeued"
    assert len({user.figures(f"sweep-{task}")[10][0] for task in range(4)}) == 4
    listed = user.leviathan("jobs").stdout
    assert all(f"{number}_{task}" in listed and f"sweep-{task}" in listed for task in range(4)), listed
    done = user.leviathan("report", *(f"runs/sweep-{task}" for task in range(4)))
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip().split()[-1])
    text = (page if page.is_absolute() else user.home / page).read_text()
    assert all(f"sweep-{task}" in text for task in range(4))


def test_cancelled_it_saves_and_stays_cancelled(cluster, user):
    number = user.submit("unwanted", until=5)
    done = user.leviathan("jobs", "cancel", "unwanted")
    assert done.returncode == 0 and "saves and then ends" in done.stdout
    log = user.ended("unwanted", number, "CANCELLED")
    assert "interrupted after step" in log and "cancelled after saving" in log
    number = user.submit("dropped", until=5)
    cluster.client("scancel", number)
    user.ended("dropped", number, "CANCELLED")
    time.sleep(8)  # a requeued job may start after five seconds
    assert user.state(number) == "CANCELLED", user.log("dropped")


def test_a_faulty_node_is_found_by_the_doctor_and_excluded(cluster, user, tmp_path):
    """The second node allows only a few open files."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" = n2 ] && ulimit -n 512\nexec {BIN / "python"} "$@"\n')
    wrapper.chmod(0o755)
    number = user.submit("picky", "training.steps=3", "launch.slurm.doctor=true", f"launch.slurm.python={wrapper}")
    log = user.ended("picky", number)
    assert "FAULTY n2: rank" in log and "limit of only 512 open files" in log
    assert "leviathan: requeued: the doctor reports n2 as faulty" in log and "no faulty node" in log
    assert "leviathan: excluded from now on: n2" in log
    assert "ExcNodeList=n2" in cluster.client("scontrol", "show", "job", "-o", number)


WRONG = {
    "model.vocab_size=128": "the tokenizer has 1024 ids",
    "launch.slurm.options=['--nodes=3']": "launch.nodes=2: SLURM allocated 3 nodes: launch.slurm.options must not",
}


@pytest.mark.parametrize("override, message", WRONG.items(), ids=["ids", "nodes"])
def test_a_wrong_configuration_is_not_requeued(user, request, override, message):
    """What the login node can know is not even submitted."""
    name = f"wrong-{request.node.callspec.id}"
    if name == "wrong-ids":
        done = user.leviathan("train", *user.job(name), override)
        assert done.returncode == 2 and message in done.stderr and not (user.home / "jobs" / name).exists()
        return
    number = user.submit(name, override)
    log = user.ended(name, number, "FAILED")
    assert log.count(message) == 1 and "not requeued: the same error would occur again" in log, log


def test_a_folder_that_a_node_does_not_see_is_told(cluster, user):
    """The setup command on the first node moves a file of the folder away."""
    number = user.submit("hidden", f"launch.slurm.setup=['mv {user.home}/jobs/hidden/config-0.yaml {user.home}/away']")
    assert "must be on a file system that all nodes share" in user.ended("hidden", number, "FAILED")


def test_followed_to_its_end_and_chained(user):
    slurm = ["launch=slurm", *TWO_NODES, "launch.slurm.time=10"]
    first = user.leviathan("train", *SMOKE, "training.steps=3", "run.name=first", *slurm)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "step 3/3" in first.stdout and "COMPLETED" in first.stdout
    rejected = user.leviathan("train", *SMOKE, "run.name=huge", *slurm, "launch.slurm.constraint=h100")
    assert rejected.returncode == 2
    assert "launch=slurm: the job was rejected: sbatch: " in rejected.stderr, rejected.stderr
    assert "Batch job submission failed: " in rejected.stderr, "SLURM's own reason"
    number = user.submit("second", "training.steps=3", "launch.slurm.dependency=afterok:first")
    user.ended("second", number)


def test_the_guide_does_what_it_says(cluster, tmp_path, executables):
    page = ROOT / "docs" / "slurm.md"
    done = [run(*block, tmp_path, executables, **cluster.environment) for block in blocks(page, slurm=True)]
    assert len(done) == 5 and all(one.returncode == 0 for one in done), [one.stderr for one in done]
    assert "COMPLETED" in done[0].stdout and "big" in done[1].stdout
