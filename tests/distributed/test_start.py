"""Checks of ranks before training: equal configurations, and a certificate for the layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch.distributed as dist

from core.config import plain
from core.errors import ConfigError
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
