"""The verb `certify`: run layouts on ranks of this machine, compare them and write the certificate."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.files import check_target, local_path, write_json
from core.package_guard import sources_digest
from parallel.layout import EngineKind
from train.certify.config import CertifyConfig
from train.config import check_language
from train.run_directory import load_config

if TYPE_CHECKING:
    from train.certify.plan import TrialOutcome


def run(config: CertifyConfig) -> int:
    """Run and compare the layouts; return 0 if every comparison passes, else 1."""
    import torch

    from launch.rank_pool import Pool
    from train.certify.plan import certificate, certify, trials
    from train.certify.store import save

    if config.run is not None:
        stored = load_config(Path(config.run))
        check_language(stored, "run", config.run)
        config = replace(config, model=stored.model, parallel=stored.parallel, cache=stored.data.cache)
        config = replace(config, optimizer=stored.optimizer, precision=stored.precision)
        config = replace(config, freeze=stored.training.freeze)
    check_target("out", config.out, ".json")
    _, omitted = trials(config)
    for line in omitted:
        print(f"omitted  {line}")
    outcomes = []
    with closing(Pool()) as pool:
        for outcome in certify(config, pool):
            outcomes.append(outcome)
            _print(outcome)
    content = certificate(config, outcomes, {"sources": sources_digest(), "torch": torch.__version__})
    path = local_path("out", config.out)
    write_json(path, content)
    save(content, Path(config.cache).expanduser())
    if content["pass"]:
        print(f"certified: {', '.join(content['axes'])} compute what one process computes; see {path}")
        return 0
    print(f"NOT certified: {' with '.join(content['smallest_failing_axes'])}: {content['first_failure']}; see {path}")
    return 1


def _print(outcome: TrialOutcome) -> None:
    from train.certify.compare import EXACT, GRADIENT_FP32

    trial, verdict = outcome.trial, "passed" if outcome.passed else "FAILED"
    figures = [f"{name} {outcome.largest(gate):.1e}" for name, gate in (("float64", EXACT), ("float32", GRADIENT_FP32))]
    if trial.parallel.engine is EngineKind.deepspeed:
        figures = [f"ZeRO-{trial.parallel.zero.stage}", figures[1]]
    print(f"{verdict}  {trial.name:<32} {trial.ranks} ranks  {'  '.join(figures)}", flush=True)
    for check, faults in outcome.faults.items():
        print(f"        {check}: {len(faults) or 'none'}", flush=True)
    for line in outcome.failures()[:4]:
        print(f"        {line}", flush=True)
