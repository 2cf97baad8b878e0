"""Coordinate check: does training change activations equally much at every width, depth and number of experts?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from core.config import plain
from core.errors import ConfigError
from core.files import write_bytes, write_json
from hparam.axes import SizeAxis
from hparam.coordinate_check import Measured, check_axis
from hparam.plots import draw_check
from hparam.rules import Parametrization
from launch.metap.config import AXES, CheckConfig
from parallel.comm.world import connect
from train.config import TrainConfig, check_language
from train.corpus import get_corpus, run_loaders
from train.eval.contamination import MODELS
from train.metap.coordinates import changes
from train.metap.hyperparameters import without_derived
from train.metap.scaling import carried


def check(config: CheckConfig, run_: TrainConfig, out: Path) -> int:
    """Run the check and write `coordinates.json` and `.png`; return 1 if a limit is exceeded, else 0."""
    if config.small_start:
        init = replace(run_.model.init, head_std=0.0, router_std=0.01 * run_.model.hidden_size**-0.5)
        run_ = replace(run_, model=replace(run_.model, init=init))
    if config.experts and not run_.model.has_experts:
        raise ConfigError("check.experts", None, "the model has no experts: set check.experts=[]")
    check_language(run_, "check", "coordinates")
    run_ = without_derived(run_)
    if run_.hparam.base is not None:
        run_ = replace(run_, hparam=replace(run_.hparam, base=None))  # the smallest model is the base
    world = connect()
    corpus = get_corpus(run_, world, print, MODELS)
    measure = partial(_measure, run_, run_loaders(run_, corpus, lambda line: None), config.steps)
    results = [
        check_axis(measure, SizeAxis[name], factors, config.seeds, lambda line: print(f"check: {line}", flush=True))
        for name in AXES
        if (factors := getattr(config, name))
    ]
    failures = [line for result in results for line in result.failures()]
    content = {
        "pass": not failures,
        "failures": failures,
        "axes": {result.axis.value: result.plain() for result in results},
        "check": plain(config),
        "run": plain(run_),
    }
    write_json(out / "coordinates.json", content)
    write_bytes(out / "coordinates.png", draw_check(results))
    print(f"{'slope of the change':<22}{'metap':>9}{'standard':>10}")
    for result in results:
        for name, value in result.slopes["metap"].items():
            print(f"{result.axis.value + ' ' + name:<22}{value:>+9.3f}{result.slopes['standard'][name]:>+10.3f}")
    for line in failures:
        print(f"FAILED  {line}")
    print(f"{'NOT passed' if failures else 'passed'}: {out / 'coordinates.json'}, {out / 'coordinates.png'}")
    return 1 if failures else 0


def _measure(
    run_: TrainConfig, loaders: Any, steps: int, axis: SizeAxis, factor: int, seed: int, rules: Parametrization
) -> Measured:
    one = carried(replace(run_, run=replace(run_.run, seed=seed)), axis, factor, rules)
    batch = loaders["main"].batch(0)  # the same batch for all steps and sizes, so that only the size differs
    return changes(one, [batch] * steps, batch)
