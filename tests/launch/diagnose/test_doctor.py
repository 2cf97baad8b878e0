"""Test which nodes the doctor names, given made-up readings, and given real ranks of which one is slowed down."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core import package_guard
from core.config import load
from launch import agent
from launch.cli import main
from launch.config import LaunchConfig, LaunchKind
from launch.diagnose import doctor, jitter, links, machine, nodes
from launch.diagnose.links import rounds
from launch.diagnose.machine import FEW_FILES, driver, free_space
from launch.diagnose.nodes import NodeReading, judge, table
from parallel.comm.world import connect
from parallel.mesh import MeshAxis, make_meshes
from train.config import TrainConfig
from train.run_directory import RunDirectory, read_config


def reading(rank: int, size: int, **other: Any) -> NodeReading:
    """Return the reading of a rank in a healthy cluster with two ranks per node, sharded over all ranks."""
    usual = NodeReading(
        *(rank, f"n{rank // 2}", "3.11.2", "2.13.0", "H100", "550.54"),
        products_flops=(600 + rank) * 1e12,
        bandwidth={"fsdp": 40e9},
        links={"fsdp": ((rank + 1) % size, (300 + rank if rank % 2 == 0 else 40 + rank) * 1e9)},
        disk_bytes_per_second=(900 + rank) * 1e6,
        disk_free_bytes=1 << 40,
        shared_memory_free_bytes=1 << 36,
        open_files=1 << 20,
        clock_s=1e9 + rank / 100,
    )
    return replace(usual, **other)


def cluster(ranks: int = 8, **n2: Any) -> list[NodeReading]:
    """Return the readings of all ranks. `n2` replaces values on node n2, which has ranks 4 and 5."""
    return [reading(rank, ranks, **(n2 if rank in (4, 5) else {})) for rank in range(ranks)]


WRONG = {
    "matmuls at 33% of the others' rate": {"products_flops": 201e12},
    "cannot write the checkpoint directory": {"disk_bytes_per_second": None},
    "disk at 5% of the others' rate": {"disk_bytes_per_second": 45e6},
    "clock is off by +5.0 s": {"clock_s": 1e9 + 5.0},
    f"limit of only {FEW_FILES - 1} open files": {"open_files": FEW_FILES - 1},
    "has torch 2.12.0, the others 2.13.0": {"torch": "2.12.0"},
    "has driver none, the others 550.54": {"driver": "none"},
}


@pytest.mark.parametrize("what, reads", WRONG.items(), ids=WRONG.keys())
def test_a_wrong_node_is_named_with_what_is_wrong(what, reads):
    readings = cluster(**reads)
    found = judge(readings)
    assert list(found) == ["n2"] and len(found["n2"]) == 2 and found["n2"][0].startswith("rank 4: "), found
    assert what in found["n2"][0]
    assert f"FAULTY n2: {found['n2'][0]}" in table(readings, found)


def slowed(readings: list[NodeReading], *ranks: int, share: float = 0.2) -> list[NodeReading]:
    """Multiply the rate of the link from each of `ranks` to the next rank by `share`."""
    found = list(readings)
    for rank in ranks:
        peer, rate = found[rank].links["fsdp"]
        found[rank] = replace(found[rank], links={"fsdp": (peer, share * rate)})
    return found


def test_a_slow_node_is_named_by_both_of_its_links():
    """All ranks read the same bandwidth for the axis; only n2's links (3 to 4 and 5 to 6) are slow. Links between nodes
    are seven times slower than links inside a node.
    """
    assert judge(cluster()) == {} and table(cluster(), {}).endswith("no faulty node"), "control"
    readings = slowed(cluster(), 3, 5)
    found = judge(readings)
    assert list(found) == ["n2"], found
    assert [line.split(" (axis fsdp) at ")[0] for line in found["n2"]] == [
        "rank 4: its link to rank 3 on n1",
        "rank 5: its link to rank 6 on n3",
    ]
    assert found["n2"][0].endswith("at 18% of the others'")
    shown = table(readings, found)
    assert "links fsdp" in shown and "GB/s between nodes" in shown and "GB/s within nodes" in shown
    assert judge(slowed(cluster(), 3, 5, share=0.7)) == {}, "control: slightly slower is not faulty"


def test_which_ends_of_slow_links_are_named():
    assert sorted(judge(slowed(cluster(), 3))) == ["n1", "n2"], "one slow link does not show which end is slow"
    assert list(judge(slowed(cluster(), 2))) == ["n1"], "a link inside a node"
    assert list(judge(slowed(cluster(6), 1, 3))) == ["n1"], "three nodes: two of three links are slow"
    assert judge(slowed(cluster(4), 1)) != {}, "two nodes: at least one is named"


@pytest.mark.parametrize("size", range(1, 10))
def test_rounds_have_every_link_once_and_disjoint_pairs(size):
    every = [pair for pairs in rounds(size) for pair in pairs]
    ring = [(place, (place + 1) % size) for place in range(size)] if size > 2 else [(0, 1)][: size - 1]
    assert sorted(every) == sorted(ring)
    for pairs in rounds(size):
        assert len({place for pair in pairs for place in pair}) == 2 * len(pairs)


def look(root: Path, slow: int) -> NodeReading:
    """Return the reading of this rank. On rank `slow`, exchanges are delayed."""
    world, honest = connect(), links._exchange
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == slow:
            patch.setattr(links, "_exchange", lambda *arguments: (time.sleep(0.4), honest(*arguments)))
        patch.setenv("SLURMD_NODENAME", f"n{world.rank}")
        parallel = [f"run.root={root}", "run.name=x", "parallel.dp_shard=4"]
        read = nodes.read(load("train", TrainConfig, parallel), world)
    assert read.node == f"n{world.rank}"
    return read


@pytest.mark.slow
def test_on_ranks_a_slow_one_is_found_by_its_links(ranks, tmp_path):
    read = ranks(4, look, tmp_path, 2)
    assert [one.links["world"][0] for one in read] == [1, 2, 3, 0]
    alike = [replace(one, products_flops=1.0, disk_bytes_per_second=1.0, bandwidth={}) for one in read]
    assert list(judge(alike)) == ["n2"], judge(alike)
    even = [replace(one, links={"world": (one.links["world"][0], 1.0)}) for one in alike]
    assert judge(even) == {}, "control: it was the links"


def axes_read(root: Path, degrees: list[str]) -> tuple[set[str], set[str], set[str]]:
    """Return three sets of axes: with a measured bandwidth, with a measured link, and with a group of several ranks."""
    world = connect()
    config = load("train", TrainConfig, [f"run.root={root}", "run.name=x", *degrees])
    meshes = vars(make_meshes(config.parallel.resolve(world.size), world)).values()
    groups = {one.name for one in meshes if isinstance(one, MeshAxis) and one.group is not None and one.size > 1}
    read = nodes.read(config, world)
    return set(read.bandwidth), set(read.links), groups


OWN_LINKS = {
    "dp_shard=4": {"world"},
    "pp=2 cp=2": {"world", "pp", "cp"},
    "dp_replicate=2 tp=2 ep=2": {"world", "dp", "tp"},
}
"""Layout -> the axes with links that no earlier axis has."""


@pytest.mark.parametrize("degrees, wanted", OWN_LINKS.items(), ids=OWN_LINKS.keys())
def test_every_axis_that_has_a_group_is_timed(ranks, tmp_path, degrees, wanted):
    found = ranks(4, axes_read, tmp_path, [f"parallel.{degree}" for degree in degrees.split()])
    assert all(bandwidth == {"world", *grouped} and len(grouped) > 2 for bandwidth, _, grouped in found)
    assert set().union(*(links for _, links, _ in found)) == wanted


def test_the_doctor_looks_where_runs_go(monkeypatch, tmp_path, capsys):
    """`~` in `runs` means the home directory, as in `run.root`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "home" / "runs" / ".doctor"

    def leave_something(node: agent.Node) -> int:
        RunDirectory.of(read_config(Path(node.command[2]))).checkpoints.mkdir(parents=True)
        assert own.exists()
        return 0

    monkeypatch.setattr(agent, "run", leave_something)
    assert main(["doctor", "runs='~/runs'", "ranks=1", "json=true"]) == 0
    assert own.parent.exists() and not own.exists()
    assert str(own.parent) in json.loads(capsys.readouterr().out)["disk"]


def test_what_is_needed_is_what_the_distribution_says(monkeypatch):
    found = doctor.examine([])
    project = tomllib.loads((package_guard.ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(found["packages"]) == sorted(line.split(">")[0] for line in project["dependencies"])
    extras = " ".join(line for lines in project["optional-dependencies"].values() for line in lines)
    assert all(name in extras for name in found["optional"]) and found["problems"] == []
    assert found["backends"]["gloo"] is True

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    (problem,) = doctor.examine([])["problems"]
    assert problem.startswith("leviathan itself is not installed: pip install -e /")


def test_ranks_and_threads_are_for_the_cores_that_we_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 7, 8, 9}, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert LaunchConfig(LaunchKind.torchrun).ranks == 2
    assert doctor.examine([])["machine"]["cores"] == 4
    for name in ("OMP_NUM_THREADS", "PYTHONSAFEPATH", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the agent sets
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(agent, "get_rendezvous_handler", lambda parameters: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        agent.run(agent.Node(("-m", "train"), 2, Path("logs")))
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_this_machine(tmp_path):
    module = tmp_path / "version"
    assert driver(module) is None
    module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12\n")
    assert driver(module) == "550.54.15"
    space = free_space(tmp_path / "not" / "yet")
    assert space["free_bytes"] > 0 and space["writable"]


def test_the_doctor_reports_fp8_backends_and_obstacles(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "FP8 by emulated      blockwise, tensorwise, rowwise, mxfp8" in said
    first, *lines = said[said.index("FP8 by te") :].splitlines()
    assert first.endswith(" none") and any("not rowwise: te supports" in line for line in lines[:7])
    assert main(["doctor", "json=true"]) == 0
    whole = json.loads(capsys.readouterr().out)
    found = whole["precision"]
    if not torch.cuda.is_available():
        assert whole["kernels"].pop("torch.compile") is None
        assert {reason.endswith("on GPUs only") for reason in whole["kernels"].values()} == {True}
    assert found["emulated"] == {"blockwise": [], "tensorwise": [], "rowwise": [], "mxfp8": []}
    assert found["te"]["blockwise"] and all(isinstance(reason, str) for reason in found["te"]["blockwise"])


@pytest.mark.parametrize(
    "nodes, gpus, numactl, bound",
    [(2, True, True, True), (1, True, True, False), (2, False, True, False), (2, True, False, False)],
)
def test_ranks_are_bound_to_the_numa_node_of_their_gpu(tmp_path, monkeypatch, nodes, gpus, numactl, bound):
    for number in range(nodes):
        (tmp_path / f"node{number}").mkdir()
    (tmp_path / "possible").write_text("0-1")
    specs: list[Any] = []

    def stop(spec: Any, node: Any) -> Any:
        specs.append(spec)
        raise InterruptedError

    monkeypatch.setattr(machine, "NUMA_NODES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if numactl else None)
    monkeypatch.setattr(agent, "_Agent", stop)
    with pytest.raises(InterruptedError):
        agent.run(agent.Node(("-c", ""), 1, tmp_path))
    assert specs[0].numa_options is (agent.NEAR_GPU if bound else None)
    assert ("not bound" in jitter.settings()["NUMA"]["value"]) == (not bound)
    assert bool(jitter.advice()) == (nodes == 2 and gpus and not numactl)


def test_the_table_says_what_keeps_ranks_in_step(monkeypatch):
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    lines = {line[:20].strip(): line for line in doctor.table(doctor.examine([])).splitlines()}
    assert "after every 100 steps (else" in lines["Python's garbage"]
    assert "NCCL_LAUNCH_ORDER_IMPLICIT=0 (" in lines["NCCL"]
    assert " PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64 (" in lines["CUDA allocator"]
