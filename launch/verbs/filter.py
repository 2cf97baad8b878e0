"""The verb `filter`: leave out of a file or data set what is easy, broken or repeated, with an audit.

On several processes: `leviathan filter processes=N ...`, or `torchrun ... -m launch.verbs.filter OVERRIDES`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.config import build, differences, load, plain, quoted
from core.errors import ConfigError, LeviathanError
from core.files import read_json, write_json
from data.config import TokenizerConfig, TokenizerKind
from data.filter.audit.findings import summary
from data.filter.audit.outputs import AUDIT_PAGE, KEPT, SCORES, write_audit_of, write_kept, write_scores
from data.filter.config import FilterRules
from data.filter.explain import explain
from data.filter.input.readers import InputConfig, RecordMaker, clean_records, input_parts
from data.filter.input.records import Record
from data.filter.pipeline import Filter, FilterJob
from data.filter.score.factory import make_scorer, models_of
from data.filter.score.scorer import Scorer
from data.filter.select.lines import COUNTS, LineFilter, check_rules
from data.filter.store import OneWorker, Workers, barrier
from data.tokenizer import Tokenizer, from_file, load_tokenizer
from launch.verbs.ablate import AblateConfig, ablate
from parallel.comm.world import World, connect
from train.eval.contamination import MODELS
from train.provenance import explain_run

STAGES = "stages"
_OWN_DATA = """'ablate.train=["data=files","data.sources.text.path=FOLDER"]'"""


class FilterAction(Enum):
    filter = "filter"
    ablate = "ablate"
    """Train on what the rules keep of a run's corpus (`ablate.train`), and on controls, at equal tokens."""
    stream = "stream"
    """Decide lines of JSON from standard input as they come."""


@dataclass(frozen=True)
class FilterConfig(FilterRules, InputConfig):
    """`out`: the directory to make, or to go on with. `tokenizer`: what counts tokens (a tokenizer.json or a folder
    with one); null: bytes stand for them. `processes`: how many filter together on this machine. `explain`: tell the
    journey of the record of this name through a filtering in `out`, and do nothing else; with `run`, the directory of a
    run whose data were filtered, through that filtering and to the steps that trained on it.
    """

    out: str = "filtered"
    tokenizer: str | None = None
    processes: int = 1
    explain: str | None = None
    run: str | None = None
    action: FilterAction = FilterAction.filter
    ablate: AblateConfig = field(default_factory=AblateConfig)

    def __post_init__(self) -> None:
        FilterRules.__post_init__(self)
        if self.explain is None and self.action is FilterAction.filter:
            InputConfig.__post_init__(self)
        if self.action is FilterAction.ablate:
            names = (*(one.name for one in fields(InputConfig)), "tokenizer", "processes", "explain", "run")
            self._refuse(names, "whose data are those of leviathan train (docs/filter.md)", [_OWN_DATA])
        if self.action is FilterAction.stream:
            names = ("input", "dataset", "subset", "split", "processes", "explain", "run")
            self._refuse(names, "which reads lines of JSON from standard input", ["< FILE"])
            check_rules(self)
            self.lines()
        if self.run is not None and self.explain is None:
            raise ConfigError("run", self.run, "is where to look a record up: name it", ["explain=ID"])
        if self.processes < 1:
            raise ConfigError("processes", self.processes, "must be positive")

    def _refuse(self, names: Sequence[str], why: str, instead: Sequence[str]) -> None:
        """Raise `ConfigError` for the first of these keys that is given: the action would not look at it."""
        for one in fields(FilterConfig):
            if one.name in names and (value := getattr(self, one.name)) != one.default:
                raise ConfigError(one.name, value, f"means nothing to filter {self.action.name}, {why}", instead)

    def lines(self) -> InputConfig:
        """What a line of standard input is made of."""
        keys = {one.name: getattr(self, one.name) for one in fields(InputConfig)}
        return InputConfig(**{**keys, "input": "-"})


def run(config: FilterConfig) -> int:
    """Filter, or explain; returns the exit code."""
    out = Path(config.out).expanduser()
    if config.explain is not None:
        print(explain(out, config.explain) if config.run is None else explain_run(Path(config.run), config.explain))
        return 0
    if config.action is FilterAction.ablate:
        return ablate(config.ablate, _rules(config), out)
    if config.action is FilterAction.stream:
        return _stream(config, out)
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        return _processes(config, out)
    world = connect()
    try:
        _filter(config, out, WorldWorkers(world) if world.size > 1 else OneWorker())
        return 0
    finally:
        world.close()


def _filter(config: FilterConfig, out: Path, workers: Workers) -> None:
    done = Filter(_job(config, out, workers))
    done.run()
    with barrier(workers):
        if workers.rank == 0:
            write_scores(done, out / SCORES)
            write_kept(done, out / KEPT)
            audit = write_audit_of(done, out, str(config.input or config.dataset), command_of(config))
            print(summary(audit))
            for warning in audit["warnings"]:
                print(f"warning: {warning['text']}")
            print(f"audit: {out / AUDIT_PAGE}")


def _stream(config: FilterConfig, out: Path) -> int:
    """Filter standard input until it ends; the counts are told then."""

    def check(records: Sequence[Record]) -> None:
        for key, name in models_of(config.scorer):
            try:
                warning = MODELS.check_unseen(name, records)
            except ConfigError as error:
                raise error.under(key) from None
            if warning is not None:
                print(f"warning: {key}: {warning}")

    clean = clean_records(config.select.clean, config.lines()) if config.select.clean else ()
    make, count_tokens = RecordMaker(config.lines()), _count_tokens(_tokenizer(config))
    done = LineFilter(make, _rules(config), _scorer(config, out), count_tokens, clean, check)
    done.run(sys.stdin.buffer, out)
    counts = done.counts()
    rate = "nothing was scored" if counts["rate"] is None else f"{counts['rate']:.2%} of the {counts['unit']} scored"
    reasons = ", ".join(f"{name} {count:,}" for name, count in counts["reasons"].items())
    print(f"kept {counts['kept']:,} of {counts['lines']:,} lines ({rate}; keep={config.keep}): {reasons}")
    print(f"no duplicates were looked for; counts: {out / COUNTS}")
    return 0


def command_of(config: FilterConfig) -> str:
    """What makes the same again."""
    plain_config, given = plain(config), ("input", "dataset")
    changed = {key: new for key, (_, new) in differences(plain(FilterConfig(input="")), plain_config).items()}
    changed = {key: plain_config[key] for key in given if plain_config[key]} | {
        key: new for key, new in changed.items() if key not in given
    }
    # a key of a dict that has none by default is to be added
    added = ("select.domains.", "contamination.sets.")
    words = [f"{'+' if key.startswith(added) else ''}{key}={_override(new)}" for key, new in changed.items()]
    return " ".join(["leviathan filter", *map(shlex.quote, words)])


def _override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_override(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_/.~][\w./~-]*", value) and value.lower() not in (
            "null",
            "true",
            "false",
            "nan",
            "inf",
        ):
            return value
        return quoted(value)
    return json.dumps(value)


def _job(config: FilterConfig, out: Path, workers: Workers) -> FilterJob:
    tokenizer = _tokenizer(config)
    return FilterJob(
        parts=input_parts(config),
        rules=_rules(config),
        scorer=_scorer(config, out),
        directory=out / STAGES,
        workers=workers,
        report=print if workers.rank == 0 else lambda line: None,
        count_tokens=_count_tokens(tokenizer),
        models=MODELS,
        tokenizer="bytes" if tokenizer is None else tokenizer.fingerprint,
        clean=clean_records(config.select.clean, config) if config.select.clean else (),
    )


def _scorer(config: FilterConfig, out: Path) -> Scorer:
    try:
        return make_scorer(config.scorer, MODELS, out / STAGES / "answers", config.seed)
    except ConfigError as error:
        raise error.under("scorer") from None


def _count_tokens(tokenizer: Tokenizer | None) -> Callable[[Sequence[str]], Sequence[int]] | None:
    """None, where there is no tokenizer: bytes stand for tokens."""
    return None if tokenizer is None else lambda texts: [len(ids) for ids in tokenizer.encode(texts)]


def _rules(config: FilterConfig) -> FilterRules:
    return FilterRules(**{one.name: getattr(config, one.name) for one in fields(FilterRules)})


def _tokenizer(config: FilterConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    path = Path(config.tokenizer).expanduser()
    if path.is_dir():
        return load_tokenizer(path)
    try:
        return from_file(TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path)))
    except ConfigError as error:
        raise ConfigError("tokenizer", config.tokenizer, error.reason) from None


class WorldWorkers:
    """The ranks that torchrun has started."""

    def __init__(self, world: World) -> None:
        self.world, self.rank, self.size = world, world.rank, world.size

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        total = torch.from_numpy(values.copy())
        torch.distributed.all_reduce(total)
        return total.numpy()

    def agree(self, error: LeviathanError | None) -> None:
        said: list[LeviathanError | None] = [None] * self.size
        torch.distributed.all_gather_object(said, error)
        for found in filter(None, said):
            found.everywhere = True
            raise found


def _processes(config: FilterConfig, out: Path) -> int:
    """What `torchrun --nproc-per-node N -m launch.verbs.filter` does."""
    from launch.agent import AgentInterrupted, Node
    from launch.agent import run as run_node

    with tempfile.TemporaryDirectory(prefix="leviathan-") as scratch:
        path = Path(scratch) / "config.json"
        write_json(path, plain(config))
        command = ("-m", "launch.verbs.filter", "--config", str(path))
        try:
            return run_node(Node(command=command, ranks=config.processes, logs=out / "logs", job="filter"))
        except AgentInterrupted as error:
            return error.exit_code


def main(arguments: list[str]) -> int:
    """One process of several. Errors that were foreseen are one line, told once."""
    from core.openmp import share_cores
    from core.package_guard import check_packages, drop_working_directory

    drop_working_directory()
    share_cores()
    try:
        check_packages()
        if arguments[:1] == ["--config"]:
            return run(build(FilterConfig, read_json(Path(arguments[1]))))
        return run(load("filter", FilterConfig, arguments))
    except LeviathanError as error:
        if os.environ.get("RANK", "0") == "0" or not error.everywhere:
            print(f"leviathan: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parents[2]:
        del sys.path[0]
    sys.exit(main(sys.argv[1:]))
