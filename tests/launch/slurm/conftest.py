"""Start one SLURM for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.support.fakes.slurm_cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert os.getuid() == 0 and shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"), (
        "these tests need root and SLURM: make slurm"
    )
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
