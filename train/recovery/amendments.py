"""What recovery has changed in a run: excluded documents, and learning rates lowered for a while.

With them, the run stays a pure function of its configuration. A checkpoint names the amendments that its steps saw, so
a resumed run repeats the same steps under any layout, and a checkpoint whose steps saw others is void.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, ConfigError, UnreadableFileError
from core.files import misfit, read_json, write_json
from data.sampling import Exclusion
from train.checkpoint.index import read_progress
from train.run_directory import CommittedCheckpoint

KEY = "amendments"
"""The key of the amendments in a checkpoint's progress."""
_AMENDMENTS = {
    "exclusions": [{"source": str, "start": int, "stop": int, "step": int}],
    "lower_rates": [{"step": int, "stop": int, "factor": float}],
}
_SHAPE = {"corpus": str, **_AMENDMENTS}


@dataclass(frozen=True)
class LowerRate:
    """Steps [step, stop) train at `factor` times the scheduled learning rate."""

    step: int
    stop: int
    factor: float


@dataclass(frozen=True)
class Amendments:
    """The amendments of a run. Each takes effect from its `step` on, counted from 0."""

    exclusions: tuple[Exclusion, ...] = ()
    lower_rates: tuple[LowerRate, ...] = ()

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate at `step`. Only the last amendment that covers it counts."""
        return next((one.factor for one in reversed(self.lower_rates) if one.step <= step < one.stop), 1.0)

    def plus(self, exclusions: Iterable[Exclusion] = (), lower_rates: Iterable[LowerRate] = ()) -> Amendments:
        """Return these amendments and further ones, each once."""
        return Amendments(
            tuple(dict.fromkeys([*self.exclusions, *exclusions])),
            tuple(dict.fromkeys([*self.lower_rates, *lower_rates])),
        )

    def plain(self) -> dict[str, Any]:
        """Return the amendments as JSON values."""
        return {name: [asdict(one) for one in getattr(self, name)] for name in _AMENDMENTS}

    def before(self, step: int) -> Amendments:
        """Return those that some of the first `step` steps saw."""
        exclusions = (one for one in self.exclusions if one.step < step)
        return Amendments().plus(exclusions, (one for one in self.lower_rates if one.step < step))

    def write(self, path: Path, corpus: str) -> None:
        """Write the file of a run that trains on the corpus with this fingerprint."""
        write_json(path, {"corpus": corpus, **self.plain()})

    @classmethod
    def of(cls, plain: Any) -> Amendments:
        """Build amendments from JSON values. Raises `ValueError` unless they are some."""
        if problem := misfit(plain, _AMENDMENTS):
            raise ValueError(problem)
        exclusions = [Exclusion(one["source"], one["start"], one["stop"], one["step"]) for one in plain["exclusions"]]
        rates = [LowerRate(one["step"], one["stop"], one["factor"]) for one in plain["lower_rates"]]
        if wrong := [one.factor for one in rates if not 0 < one.factor <= 1]:
            raise ValueError(f"a factor of {wrong[0]} does not lower a learning rate")
        return cls().plus(exclusions, rates)


def read_amendments(path: Path, corpus: str) -> Amendments:
    """Read a file of amendments: none if it does not exist. Raises `ConfigError` if it is damaged or of another run."""
    if not path.exists():
        return Amendments()
    try:
        content = read_json(path, _SHAPE)
        found = Amendments.of(content)
    except (OSError, UnreadableFileError, ValueError) as error:
        raise ConfigError("recovery.amendments", None, f"{path} cannot be read ({error}): restore it") from None
    if content["corpus"] != corpus:
        raise ConfigError("recovery.amendments", str(path), "is of a run on other data: name the run's own")
    return found


def run_amendments(own: Path, given: Path | None, corpus: str) -> Amendments:
    """Return the amendments of a run: its own, and those of the file that its configuration names."""
    found = read_amendments(own, corpus)
    if given is not None:
        if not given.exists():
            raise ConfigError("recovery.amendments", str(given), "does not exist")
        more = read_amendments(given, corpus)
        found = found.plus(more.exclusions, more.lower_rates)
    return found


def void(present: Sequence[CommittedCheckpoint], amendments: Amendments, path: Path) -> Iterator[CommittedCheckpoint]:
    """Yield the checkpoints whose steps saw fewer amendments than they should: the run must not resume from them.

    Raises `CheckpointError` if a checkpoint has seen amendments that `path`, the run's file, lacks.
    """
    for one in present:
        try:
            seen = Amendments.of(read_progress(one.path).get(KEY, Amendments().plain()))
        except (OSError, ValueError, CheckpointError):
            continue  # damaged: restoring says so
        due = amendments.before(one.step)
        if not set(seen.exclusions) <= {*due.exclusions} or not set(seen.lower_rates) <= {*due.lower_rates}:
            raise CheckpointError(f"{path} lacks amendments that {one.path.name} was trained with: restore the file")
        if seen != due and (set(seen.exclusions), set(seen.lower_rates)) != (set(due.exclusions), set(due.lower_rates)):
            yield one
