"""Ranks before training: their groups, equal configurations, and a certificate for the layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from bench.scale.__main__ import CountingStore
from core.config import plain
from core.errors import ConfigError
from parallel.comm import tree
from parallel.comm.world import connect
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from tests.support.tiny import EXACT, config, saved
from train.certify import store
from train.certify.plan import shrink, techniques
from train.trainer import run


def refused(root: Path, overrides: list[str]) -> str:
    try:
        run(config(root, "run", *overrides, f"run.seed={dist.get_rank()}"))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_other_seeds_are_rejected(ranks, small_corpus, tmp_path):
    errors = ranks(2, refused, tmp_path, [*small_corpus, *EXACT])
    assert errors[0] == errors[1]
    assert re.fullmatch(r"configuration: rank 1 has (\w+), the other ranks (\w+): .*", errors[0])
    assert not (tmp_path / "run").exists()


def certificate(root: Path, overrides: list[str]) -> str | None:
    begun = saved(root, "run", overrides)
    begun.log("saved")
    return begun.certificate


def test_checkpoints_name_the_certificate_or_its_lack_is_logged(ranks, small_corpus, tmp_path):
    assert ranks(2, certificate, tmp_path / "without", [*small_corpus, *EXACT]) == [None, None]
    advice = f"no certificate for this layout and this code; to make one: leviathan certify {tmp_path}/without/run"
    assert (tmp_path / "without" / "run" / "log.txt").read_text().count(advice) == 1
    cache = Path(small_corpus[-1].removeprefix("data.cache="))
    asked = config(tmp_path, "run", *small_corpus, *EXACT)
    about = {"model": plain(shrink(asked.model, asked.parallel)), "techniques": techniques(asked.parallel)}
    path = store.save({"pass": True, "axes": ["dp_shard"], **about}, cache)
    try:
        wanted = store.find({"dp_shard": 2}, asked.model, asked.parallel, cache)
        assert wanted is not None
        assert ranks(2, certificate, tmp_path, [*small_corpus, *EXACT]) == [wanted, wanted]
    finally:
        path.unlink()
    (progress,) = (tmp_path / "run").glob("checkpoints/*/progress.json")
    assert json.loads(progress.read_text())["certificate"] == wanted
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "saved" in log and "no certificate" not in log


def sums() -> dict[str, float]:
    """Sum ones over each axis on real ranks, and a rank's number over the group on the host, after a limit is set."""
    world = connect()
    meshes = make_meshes(ParallelConfig(pp=2, ep=2).resolve(world.size), world)
    world.limit(30.0)
    found = {}
    for axis in meshes.joined:
        ones = torch.ones(1)
        axis.sum(ones, "test")
        found[axis.name] = ones.item() / axis.size
    gathered = tree.gather(world.rank, world.groups.host())
    found["host"] = tree.spread(float(gathered == list(range(world.size))), world.groups.host())
    return found


def test_groups_connect_the_right_ranks(ranks):
    assert ranks(4, sums) == [{"world": 1, "pp": 1, "ends": 1, "dp": 1, "fsdp": 1, "experts": 1, "host": 1}] * 4


def requests_of_host(lazy: bool) -> int:
    """Return what this rank requests from the store to make the group on the host, and to gather along the tree."""
    store = CountingStore()
    store.inner = dist.distributed_c10d._get_default_store()
    with patch.dict(dist.distributed_c10d._world.pg_map, {dist.group.WORLD: ("gloo", store)}):
        group = connect().groups.host() if lazy else dist.new_group(backend="gloo")
    with patch.object(tree, "NODE", 2):
        tree.gather(0, group)
    return store.requests.total()


def test_a_lazy_group_requests_little_from_the_store(ranks):
    found, eager = ranks(4, requests_of_host, True), ranks(4, requests_of_host, False)
    assert found == [1 + 2 * 2, 1 + 2, 1 + 2 * 2, 1 + 2], "itself, and two requests for each rank that it talks to"
    assert eager == [1 + 2 * 4] * 4, "control: a full mesh"
