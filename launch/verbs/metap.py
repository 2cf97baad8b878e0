"""The verb `metap`: transfer hyperparameters from a small model to a large one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from core.config import load
from core.errors import ConfigError
from core.files import local_path
from launch.metap.config import CheckConfig, FitConfig, SweepConfig
from train.config import TrainConfig


class MetapAction(Enum):
    transfer = "transfer"
    """Write the configuration of a target model with hyperparameters transferred from a base."""
    check = "check"
    """Check that training changes activations equally much at every width, depth and number of experts."""
    sweep = "sweep"
    """Train a grid of learning rates."""
    fit = "fit"
    """Find the best learning rate of a sweep, its confidence interval, and how it depends on sizes."""


@dataclass(frozen=True)
class MetapConfig:
    """Actions: `check`, `sweep`, `fit`, `transfer`. Other keys are those of `leviathan train`: they describe the base
    of a check or sweep, or the target of a transfer.
    """

    action: MetapAction = MetapAction.check
    """What to do."""
    out: str = "metap"
    """Folder for results. A sweep writes its runs there, and is continued by the same command."""
    train: list[str] = field(default_factory=lambda: ["experiment=smoke"])
    """Overrides of `leviathan train`; keys that `metap` does not have are collected here."""
    base: str | None = None
    """Base of a transfer: a file that `fit` wrote, or the directory of a run."""
    name: str = "transferred"
    """Name of the file that a transfer writes."""
    check: CheckConfig = field(default_factory=CheckConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.action is MetapAction.transfer and self.base is None:
            raise ConfigError("base", None, "name what to transfer from: a file that `metap fit` wrote, or a run")


def run(config: MetapConfig) -> int:
    """Run the action; return the exit code, which is 1 if a check exceeds a limit."""
    from launch.metap.check import check
    from launch.metap.fit import fit
    from launch.metap.runs import bases
    from launch.metap.sweep import sweep
    from launch.metap.transfer import transfer

    out = local_path("out", config.out)
    with _folder(out / "experiment" if config.action is MetapAction.transfer else out):
        match config.action:
            case MetapAction.transfer:
                return transfer(str(config.base), config.train, config.name, out)
            case MetapAction.fit:
                return fit(config.fit, out)
            case MetapAction.sweep:
                return sweep(config.sweep, bases(config.train), out)
            case MetapAction.check:
                return check(config.check, load("train", TrainConfig, config.train), out)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder for the results. After a `ConfigError` remove what was made, if nothing is in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except ConfigError:
        with suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()
        raise
