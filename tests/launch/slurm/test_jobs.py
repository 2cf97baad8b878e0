"""Jobs on a real SLURM: whatever hits them, they go on by themselves to the same losses, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.test_command import BIN
from tests.support.slurm_cluster import Cluster
from tests.test_docs import ROOT, blocks, run

pytestmark = pytest.mark.slow

STEPS = 80
SMOKE = [
    "experiment=smoke",
    f"training.steps={STEPS}",
    "logging.every=1",
    "logging.report=false",
    "checkpoint.every=20",
    "evaluation.sequences=4",
    "evaluation.baselines=false",
]
TWO_NODES = ["launch.nodes=2", "launch.processes=1", "parallel.ep=2", "launch.slurm.save_s=60"]


class User:
    """Somebody at the login node, in a folder that all nodes share."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self.home = cluster, home
        self.environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}

    def leviathan(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [str(BIN / "leviathan"), *arguments]
        return subprocess.run(line, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=300)

    def submit(self, name: str, *overrides: str) -> str:
        """Returns the job's number."""
        slurm = ["launch=slurm", "launch.slurm.follow=false", *TWO_NODES, "launch.slurm.time=20"]
        done = self.leviathan("train", *SMOKE, f"run.name={name}", *slurm, *overrides)
        assert done.returncode == 0, done.stderr
        return json.loads((self.home / "jobs" / name / "job.json").read_text())["number"]

    def log(self, name: str, task: int = 0) -> str:
        path = self.home / "jobs" / name / f"log-{task}.txt"
        return path.read_text() if path.exists() else ""

    def figures(self, name: str) -> dict[int, tuple[float, float]]:
        path = self.home / "runs" / name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}

    def heldout(self, name: str) -> float:
        return json.loads((self.home / "runs" / name / "summary.json").read_text())["heldout_loss"]

    def has_step(self, name: str, step: int) -> Callable[[], bool]:
        return lambda: step in self.figures(name)

    def state(self, number: str) -> str:
        return self.cluster.client("scontrol", "show", "job", "-o", number).partition("JobState=")[2].split()[0]

    def nodes_of(self, number: str) -> list[str]:
        """Where the job runs, or ran last."""
        shown = self.cluster.client("scontrol", "show", "job", "-o", number).partition(" NodeList=")[2].split()[0]
        return self.cluster.client("scontrol", "show", "hostnames", shown).split()

    def wait_for_end(self, name: str, number: str, seconds: float = 480) -> str:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        try:
            self.cluster.wait(lambda: self.state(number) in ended, "end of the job", seconds)
        except TimeoutError:
            raise AssertionError(f"{self.state(number)}:\n{self.log(name)}") from None
        return self.state(number)


@pytest.fixture(scope="module")
def user(cluster, tmp_path_factory) -> Iterator[User]:
    yield User(cluster, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def undisturbed(user) -> tuple[dict[int, tuple[float, float]], float]:
    """Every loss and norm of a two-node job that nothing happened to, and its held-out loss."""
    number = user.submit("calm")
    assert user.wait_for_end("calm", number) == "COMPLETED", user.log("calm")
    found = user.figures("calm")
    assert sorted(found) == list(range(1, STEPS + 1)) and found[STEPS][0] < found[1][0] - 1
    assert "resuming from" not in user.log("calm")
    return found, user.heldout("calm")


@pytest.mark.parametrize("warning", ["USR1", "TERM"])
def test_warned_by_a_signal_it_saves_and_goes_on(cluster, user, undisturbed, warning):
    """SLURM sends USR1 before the time limit, and TERM to a job that is to make room."""
    name = f"warned-{warning}"
    number = user.submit(name)
    cluster.wait(user.has_step(name, 25), "step 25", 240)
    cluster.client("scancel", f"--signal={warning}", number)
    assert user.wait_for_end(name, number) == "COMPLETED", user.log(name)
    assert (user.figures(name), user.heldout(name)) == undisturbed
    log = user.log(name)
    assert "interrupted after step" in log and "queued again, to go on from step" in log
    assert log.count("resuming from step-") == 1


def test_preempted_by_a_partition_it_saves_and_comes_back(cluster, user, undisturbed):
    """SLURM sends TERM and would kill the job and queue it again a minute later; the job is faster."""
    number = user.submit("humble")
    cluster.wait(user.has_step("humble", 25), "step 25", 240)
    urgent = ["--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    other = cluster.client("sbatch", *urgent).strip()
    cluster.wait(lambda: user.state(other) == "RUNNING", "preemption", 240)
    assert user.state(number) == "PENDING"
    assert user.wait_for_end("humble", number) == "COMPLETED", user.log("humble")
    assert user.state(other) == "COMPLETED"
    assert (user.figures("humble"), user.heldout("humble")) == undisturbed
    log = user.log("humble")
    assert "interrupted after step" in log and "stopped from outside; queued again, to go on from step" in log
    assert log.count("resuming from step-") == 1


@pytest.mark.parametrize("what", ["daemon", "node"])
def test_a_dead_daemon_changes_nothing_and_a_dead_node_is_replaced(cluster, user, undisturbed, what):
    name = f"without-{what}"
    number = user.submit(name)
    cluster.wait(user.has_step(name, 25), "step 25", 240)
    victim = user.nodes_of(number)[1]
    (cluster.kill_daemon if what == "daemon" else cluster.kill_node)(victim)
    try:
        assert user.wait_for_end(name, number) == "COMPLETED", user.log(name)
    finally:
        cluster.start_node(victim)
    assert (user.figures(name), user.heldout(name)) == undisturbed
    assert user.log(name).count("resuming from step-00000020") == (what == "node")


def test_a_node_that_hangs_is_named_and_left_out(cluster, user, undisturbed):
    """The first node's ranks are stopped, and no restarts are left: the job goes on elsewhere."""
    number = user.submit("stuck", "parallel.timeout_s=5", "launch.restarts=0")
    cluster.wait(user.has_step("stuck", 25), "step 25", 240)
    victim = user.nodes_of(number)[0]
    cluster.stop_ranks(victim)
    assert user.wait_for_end("stuck", number) == "COMPLETED", user.log("stuck")
    assert (user.figures("stuck"), user.heldout("stuck")) == undisturbed
    log = user.log("stuck")
    assert "gives no sign of life since step" in log and f"on {victim})" in log
    assert f"leviathan: left out from now on: {victim}" in log and "resuming from step-00000020" in log
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
def test_a_slow_node_is_left_out_where_enough_stay(cluster, user, tmp_path, enough):
    """Matrix products are slow on n1. Where one of the three nodes is not to be used anyway, both others stay."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    name = f"limping-{enough}"
    usable = [] if enough else ["launch.slurm.exclude=[n3]"]
    path = [f"+launch.slurm.environment.PYTHONPATH={tmp_path}"]
    number = user.submit(name, "training.steps=40", *usable, *path)
    cluster.wait(user.has_step(name, 5), "step 5", 240)
    assert "n1" in user.nodes_of(number), "SLURM takes the first nodes that are idle"
    cluster.client("scancel", "--signal=USR1", number)
    assert user.wait_for_end(name, number) == "COMPLETED", user.log(name)
    log = user.log(name)
    assert "leviathan: steadily slow in this try: n1\n" in log and log.count("resuming from step-") == 1
    assert ("leviathan: left out from now on: n1\n" in log) == enough
    kept = "leviathan: not all left out of n1,n3: SLURM says, allocation failure: Requested node configuration"
    assert (kept in log) == (not enough)
    assert ("n1" in user.nodes_of(number)) == (not enough)


@pytest.mark.parametrize("dies", ["always", "once"])
def test_a_job_whose_ranks_keep_dying_is_given_up(user, tmp_path, dies):
    """The ranks kill themselves before their first step: in each try, or as a control in the first one only."""
    when = "True" if dies == "always" else "'SLURM_RESTART_COUNT' not in os.environ"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, signal\nif 'RANK' in os.environ and {when}:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dying = ["launch.restarts=1", "launch.slurm.requeues=1", f"+launch.slurm.environment.PYTHONPATH={tmp_path}"]
    number = user.submit(f"dies-{dies}", "training.steps=3", *dying)
    ended = user.wait_for_end(f"dies-{dies}", number)
    log = user.log(f"dies-{dies}")
    assert "was ended by SIGKILL" in log and "starting again; restarts left: 1" in log
    assert log.count("leviathan: failed (3); queued again, to go on from its newest checkpoint") == 1
    given_up = "leviathan: not queued again: 2 tries in a row reached no new checkpoint"
    assert (ended, log.count(given_up)) == (("FAILED", 1) if dies == "always" else ("COMPLETED", 0)), log


def test_a_container_command_goes_before_python_on_each_node(cluster, user, tmp_path):
    """A script stands for the container runtime; the ranks are within what it has started."""
    runtime, marks = tmp_path / "runtime", tmp_path / "marks"
    runtime.write_text(
        f'#!/bin/bash\n[ "$1 $2" = "exec image.sif" ] || exit 64\nshift 2\necho "$SLURMD_NODENAME $4 $5" >> {marks}\n'
        'export OMP_STACKSIZE=7M\nexec "$@"\n'
    )
    runtime.chmod(0o755)
    number = user.submit("boxed", "training.steps=3", f"launch.slurm.container='{runtime} exec image.sif'")
    assert user.wait_for_end("boxed", number) == "COMPLETED", user.log("boxed")
    nodes = user.nodes_of(number)
    lines = marks.read_text().splitlines()
    assert sorted(line for line in lines if "train" in line) == [
        f"{node} launch.slurm.job_step train" for node in nodes
    ], lines
    assert len(lines) == 3 and lines[2].startswith(f"{nodes[0]} "), "and once for what the job does at its end"
    environment = json.loads((user.home / "runs" / "boxed" / "environment.json").read_text())
    assert environment["variables"]["OMP_STACKSIZE"] == "7M"


def test_the_time_limit_is_no_end(user, undisturbed):
    """Two minutes, of which one is kept for saving: evaluating at every step, the run takes longer than that."""
    number = user.submit("short", "launch.slurm.time=2", "evaluation.every=1", "evaluation.sequences=12")
    assert user.wait_for_end("short", number, 600) == "COMPLETED", user.log("short")
    assert user.figures("short") == undisturbed[0]
    log = user.log("short")
    assert 1 <= log.count("leviathan: queued again, to go on from step") == log.count("resuming from step-")


def test_an_array_job_is_a_sweep_and_is_laid_side_by_side(cluster, user):
    rates = (0.001, 0.002, 0.004, 0.008)
    one_node = ["launch.nodes=1", "launch.slurm.cpus=1", "launch.slurm.memory=2000", "parallel.ep=1"]
    number = user.submit("sweep", *one_node, "training.steps=10", f"optimizer.lr={','.join(map(str, rates))}")
    cluster.wait(user.has_step("sweep-1", 2), "step 2 of the second run", 240)
    cluster.client("scancel", "--signal=USR1", f"{number}_1")
    for task in range(4):
        assert user.wait_for_end("sweep", f"{number}_{task}") == "COMPLETED", user.log("sweep", task)
    again = ["queued again" in user.log("sweep", task) for task in range(4)]
    assert again == [False, True, False, False], "one of them was warned, and it alone went through the queue again"
    firsts = [user.figures(f"sweep-{task}")[10][0] for task in range(4)]
    assert len(set(firsts)) == 4
    listed = user.leviathan("jobs").stdout
    assert all(f"{number}_{task}" in listed and f"sweep-{task}" in listed for task in range(4)), listed
    done = user.leviathan("report", *(f"runs/sweep-{task}" for task in range(4)))
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip().split()[-1])
    text = (page if page.is_absolute() else user.home / page).read_text()
    assert all(f"sweep-{task}" in text for task in range(4))


def test_cancelled_it_saves_and_stays_cancelled(cluster, user):
    number = user.submit("unwanted")
    cluster.wait(user.has_step("unwanted", 5), "step 5", 240)
    done = user.leviathan("jobs", "cancel", "unwanted")
    assert done.returncode == 0 and "it saves first" in done.stdout
    assert user.wait_for_end("unwanted", number) == "CANCELLED"
    assert "interrupted after step" in user.log("unwanted") and "cancelled after saving" in user.log("unwanted")
    number = user.submit("dropped")
    cluster.wait(user.has_step("dropped", 5), "step 5", 240)
    cluster.client("scancel", number)
    assert user.wait_for_end("dropped", number) == "CANCELLED"
    time.sleep(8)  # a job that is queued again is eligible after five
    assert user.state(number) == "CANCELLED", user.log("dropped")


def test_a_wrong_node_is_found_by_the_doctor_and_left_out(cluster, user, tmp_path):
    """On the second node only a few files may be open."""
    wrapper = tmp_path / "python"
    python = BIN / "python"
    wrapper.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" = n2 ] && ulimit -n 512\nexec {python} "$@"\n')
    wrapper.chmod(0o755)
    number = user.submit("picky", "training.steps=3", "launch.slurm.doctor=true", f"launch.slurm.python={wrapper}")
    assert user.wait_for_end("picky", number) == "COMPLETED", user.log("picky")
    log = user.log("picky")
    assert "WRONG n2: rank" in log and "only 512 files may be open" in log
    assert "leviathan: queued again: the doctor finds n2 wrong" in log and "all nodes are well" in log
    assert "leviathan: left out from now on: n2" in log
    assert "ExcNodeList=n2" in cluster.client("scontrol", "show", "job", "-o", number)


WRONG = {
    "model.vocab_size=128": "the tokenizer has 1024 ids",
    "launch.slurm.options=['--nodes=3']": "launch.nodes=2: SLURM has given the job 3: launch.slurm.options must not",
}


@pytest.mark.parametrize("override, message", WRONG.items(), ids=["ids", "nodes"])
def test_a_wrong_configuration_is_not_queued_again(user, request, override, message):
    name = f"wrong-{request.node.callspec.id}"
    number = user.submit(name, override)
    assert user.wait_for_end(name, number) == "FAILED"
    log = user.log(name)
    assert log.count(message) == 1 and "not queued again: the same error would come again" in log, log


def test_a_folder_that_a_node_does_not_see_is_told(cluster, user):
    """The first node's shell hides it."""
    number = user.submit("hidden", f"launch.slurm.setup=['mv {user.home}/jobs/hidden/config-0.yaml {user.home}/away']")
    assert user.wait_for_end("hidden", number) == "FAILED"
    assert "must be on a file system that all nodes share" in user.log("hidden")


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
    assert user.wait_for_end("second", number) == "COMPLETED", user.log("second")


def test_the_guide_does_what_it_says(cluster, tmp_path):
    page = ROOT / "docs" / "slurm.md"
    done = [run(*block, tmp_path, **cluster.environment) for block in blocks(page, slurm=True)]
    assert len(done) == 4 and all(one.returncode == 0 for one in done), [one.stderr for one in done]
    assert "COMPLETED" in done[0].stdout and "big" in done[1].stdout
