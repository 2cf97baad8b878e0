"""Start training runs: in this process, in ranks of this machine, or in a SLURM job. A sweep is several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from core.config import absolute, build, differences, load_stored, plain
from core.errors import ConfigError, LeviathanError
from core.exit_codes import CRASHED, INTERRUPTED
from core.process import report, say
from launch.config import LaunchConfig, LaunchKind
from launch.diagnose.machine import check_processes
from launch.ranks import run_ranks
from train.config import TrainConfig, check
from train.metap.hyperparameters import resolve, without_derived
from train.run_directory import RunDirectory, read_config, write_config


def checked(configs: list[TrainConfig]) -> list[TrainConfig]:
    """Return the configurations with derived values. Makes every check that needs only one process, so that an error
    is printed once, before ranks start.
    """
    for config in configs[1:]:
        for key, (first, other) in differences(configs[0].launch, config.launch, "launch").items():
            reason = f"differs from the first run of the sweep ({first}); give launch.* one value"
            raise ConfigError(key, other, reason)
    configs = [absolute(resolve(config)) for config in configs]
    launch = build(LaunchConfig, configs[0].launch, "launch")
    for config in configs:
        check(config, launch.ranks if launch.kind is not LaunchKind.inline else 1)
    if launch.kind is LaunchKind.torchrun and launch.nodes > 1 and configs[0].run.name is None:
        raise ConfigError("run.name", None, "is required with several nodes: give the same name on each")
    return configs


def train(configs: list[TrainConfig]) -> int:
    """Train as configured in `launch`; return the exit code."""
    configs = named(checked(configs))
    launch = build(LaunchConfig, configs[0].launch, "launch")
    if launch.kind is LaunchKind.slurm:
        from launch.slurm.submit import submit_and_follow

        return submit_and_follow(configs, launch)
    if launch.nodes == 1:
        from data.corpus import check_found

        for config in configs:
            check_found(config.data)
    if launch.kind is LaunchKind.torchrun:
        check_processes("launch.processes", launch.ranks_per_node, launch.oversubscribe)
    _predict(configs, launch)
    start = partial(_torchrun, launch) if launch.kind is LaunchKind.torchrun else _inline
    return start(configs[0]) if len(configs) == 1 else _one_by_one(configs, start)


def read_stored(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """Return the configuration in `path` with `overrides` applied. Hyperparameters derived from `hparam.base` are
    derived again if anything outside the sections `run` and `launch` is overridden. A configuration in the directory of
    a run names that run, wherever the directory and the user are now.
    """
    config, directory = read_config(path), path.absolute().parent
    if config.run.name == directory.name:
        config = replace(config, run=replace(config.run, root=str(directory.parent)))
    if not all(one.startswith(("run.", "launch.")) for one in overrides):
        config = without_derived(config)
    return load_stored(plain(config), TrainConfig, overrides)


def _predict(configs: list[TrainConfig], launch: LaunchConfig) -> None:
    """Print and store what the planner predicts, on machines with a GPU."""
    import torch

    if torch.cuda.is_available() and not launch.node_rank:
        from launch.plan.search.predict import announce

        for config in configs:
            announce(config, launch)


def _one_by_one(configs: list[TrainConfig], start: Callable[[TrainConfig], int]) -> int:
    """Train one run after the other. A failed run does not stop the others; an interrupted run does. Return 130
    after an interruption, else the first nonzero code, or 0.
    """
    codes = []
    for config in configs:
        try:
            code = start(config)
        except LeviathanError as error:
            report(error, str(config.run.name))
            code = error.exit_code
        if code == INTERRUPTED:
            return code
        codes.append(code)
    return next((code for code in codes if code), 0)


def named(configs: list[TrainConfig]) -> list[TrainConfig]:
    """Give each run its own name: NAME, or NAME-0, NAME-1, ... in a sweep whose runs lack distinct names."""
    if None not in (given := [config.run.name for config in configs]) and len(set(given)) == len(given):
        return configs
    first = RunDirectory.of(configs[0]).path.name
    names = [first] if len(configs) == 1 else [f"{first}-{index}" for index in range(len(configs))]
    return [replace(c, run=replace(c.run, name=name)) for c, name in zip(configs, names, strict=True)]


def _inline(config: TrainConfig) -> int:
    from train.trainer import run

    return run(config)


def _torchrun(launch: LaunchConfig, config: TrainConfig) -> int:
    """Do what `torchrun --nproc-per-node RANKS -m train` does, with the agent in this process. Ctrl-C and SIGTERM are
    forwarded to the ranks, which save. The exit code is then 130.
    """
    from launch.agent import Node

    directory = RunDirectory.of(config)
    node = Node(
        command=("-m", "train", "--config"),
        ranks=launch.ranks_per_node,
        logs=directory.logs,
        nodes=launch.nodes,
        is_first=not launch.node_rank,
        rendezvous=None if launch.rendezvous is None else launch.endpoint,
        restarts=launch.restarts,
        job=directory.path.name,
    )
    say(f"starting {node.ranks} ranks; their output: {node.logs}")
    code = run_ranks(node, lambda path: write_config(path, config))
    if code == CRASHED:
        name = directory.path.name
        raise LeviathanError(f"{name} failed; rerun with run.name={name} to resume from its last checkpoint")
    return code
