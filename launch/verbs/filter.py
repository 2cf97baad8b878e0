"""The verb `filter`: drop easy, broken and repeated records from a file or data set, with an audit.

With several processes: `leviathan filter processes=N ...`, or `torchrun ... -m launch.verbs.filter OVERRIDES`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.config import build, differences, load, plain, quoted
from core.errors import ConfigError, LeviathanError, check_numbers
from core.exit_codes import CRASHED
from core.files import read_json, write_json
from data.config import TokenizerConfig, TokenizerKind
from data.filter.audit.findings import summary
from data.filter.audit.outputs import AUDIT_PAGE, KEPT, SCORES, write_audit_of, write_kept, write_scores
from data.filter.config import FilterRules, under
from data.filter.explain import explain
from data.filter.input.readers import InputConfig, clean_records, input_parts
from data.filter.input.records import Record
from data.filter.pipeline import Filter, FilterJob
from data.filter.score.factory import check_models, make_scorer
from data.filter.score.scorer import Scorer
from data.filter.select.lines import COUNTS, LineFilter, check_rules
from data.filter.store import OneWorker, Workers, barrier
from data.tokenizer import Tokenizer, from_file, load_tokenizer
from launch.ablate import AblateConfig, ablate
from parallel.comm.world import World, connect
from train.eval.contamination import MODELS
from train.provenance import explain_run

STAGES = "stages"
_OWN_DATA = """'ablate.train=["data=files","data.sources.text.path=FOLDER"]'"""
_BARE_WORD = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_/.~][\w./~-]*", re.IGNORECASE)
_INPUT_KEYS = tuple(one.name for one in fields(InputConfig))


class FilterAction(Enum):
    filter = "filter"
    ablate = "ablate"
    """Compare training on the filtered corpus of `ablate.train` with training on controls, at equal tokens."""
    stream = "stream"
    """Filter JSON lines from standard input as they arrive."""


@dataclass(frozen=True)
class FilterConfig(FilterRules, InputConfig):
    out: str = "filtered"
    """Output directory. If it exists, its filter run is resumed."""
    tokenizer: str | None = None
    """Tokenizer that counts tokens: a tokenizer.json or a folder with one. null: each byte counts as a token."""
    processes: int = 1
    """Number of processes on this machine."""
    explain: str | None = None
    """Id of a record. Explain what the filter run in `out` decided about it, and do nothing else."""
    run: str | None = None
    """With `explain`: the directory of a training run. The record is followed through the run's filter to the training
    steps that used it.
    """
    action: FilterAction = FilterAction.filter
    """`filter`, `stream` (lines of JSON from standard input), or `ablate` (train on filtered data and controls)."""
    ablate: AblateConfig = field(default_factory=AblateConfig)

    def __post_init__(self) -> None:
        FilterRules.__post_init__(self)
        if self.explain is None and self.action is FilterAction.filter:
            InputConfig.__post_init__(self)
        if self.action is FilterAction.ablate:
            keys = (*_INPUT_KEYS, "tokenizer", "processes", "explain", "run")
            self._refuse(keys, "whose data are those of leviathan train (docs/filter.md)", [_OWN_DATA])
        if self.action is FilterAction.stream:
            keys = ("input", "dataset", "subset", "split", "processes", "explain", "run")
            self._refuse(keys, "which reads JSON lines from standard input", ["< FILE"])
            check_rules(self)
            self.lines()
        if self.run is not None and self.explain is None:
            raise ConfigError("run", self.run, "requires the id of a record to explain", ["explain=ID"])
        check_numbers(self, positive=("processes",))

    def _refuse(self, keys: Sequence[str], why: str, instead: Sequence[str]) -> None:
        """Raise `ConfigError` for the first of these keys that is set, since the action ignores it."""
        for one in fields(FilterConfig):
            if one.name in keys and (value := getattr(self, one.name)) != one.default:
                raise ConfigError(one.name, value, f"has no effect on filter {self.action.name}, {why}", instead)

    def lines(self) -> InputConfig:
        """Return the input settings for lines of standard input."""
        return InputConfig(**{**{key: getattr(self, key) for key in _INPUT_KEYS}, "input": "-"})

    def rules(self) -> FilterRules:
        return FilterRules(**{one.name: getattr(self, one.name) for one in fields(FilterRules)})


def run(config: FilterConfig) -> int:
    """Filter, explain, stream or ablate as configured; return the exit code."""
    out = Path(config.out).expanduser()
    if config.explain is not None:
        print(explain(out, config.explain) if config.run is None else explain_run(Path(config.run), config.explain))
        return 0
    if config.action is FilterAction.ablate:
        return ablate(config.ablate, config.rules(), out)
    if config.action is FilterAction.stream:
        return _stream(config, out)
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        return _processes(config, out)
    with closing(connect()) as world:
        _filter(config, out, WorldWorkers(world) if world.size > 1 else OneWorker())
        return 0


def _filter(config: FilterConfig, out: Path, workers: Workers) -> None:
    tokenizer = _tokenizer(config)
    job = FilterJob(
        parts=input_parts(config),
        rules=config.rules(),
        scorer=_scorer(config, out),
        directory=out / STAGES,
        workers=workers,
        report=print if workers.rank == 0 else lambda line: None,
        count_tokens=_count_tokens(tokenizer),
        models=MODELS,
        tokenizer="bytes" if tokenizer is None else tokenizer.fingerprint,
        clean=clean_records(config.select.clean, config) if config.select.clean else (),
    )
    done = Filter(job)
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
    """Filter standard input until it ends, then print the counts."""

    def check(records: Sequence[Record]) -> None:
        check_models(MODELS, config.scorer, lambda: records, print)

    clean = clean_records(config.select.clean, config.lines()) if config.select.clean else ()
    count_tokens = _count_tokens(_tokenizer(config))
    done = LineFilter(config.lines(), config.rules(), _scorer(config, out), count_tokens, clean, check)
    done.run(sys.stdin.buffer, out)
    counts = done.counts()
    rate = "nothing was scored" if counts["rate"] is None else f"{counts['rate']:.2%} of the {counts['unit']} scored"
    reasons = ", ".join(f"{name} {count:,}" for name, count in counts["reasons"].items())
    print(f"kept {counts['kept']:,} of {counts['lines']:,} lines ({rate}; keep={config.keep}): {reasons}")
    print(f"a stream is not searched for duplicates; counts: {out / COUNTS}")
    return 0


def command_of(config: FilterConfig) -> str:
    """Return the command that repeats the filter."""
    values, inputs = plain(config), ("input", "dataset")
    changed = {key: new for key, (_, new) in differences(plain(FilterConfig(input="")), values).items()}
    given = {key: values[key] for key in inputs if values[key]}
    shown = {key: value for key, value in (given | changed).items() if key in given or key not in inputs}
    # Hydra sets a key of a dictionary that is empty by default only with +
    added = ("select.domains.", "contamination.sets.")
    words = [f"{'+' if key.startswith(added) else ''}{key}={_override(value)}" for key, value in shown.items()]
    return " ".join(["leviathan filter", *map(shlex.quote, words)])


def _override(value: Any) -> str:
    """Write a value in Hydra's override grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_override(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str):
        return value if _BARE_WORD.fullmatch(value) else quoted(value)
    return json.dumps(value)


def _scorer(config: FilterConfig, out: Path) -> Scorer:
    with under("scorer"):
        return make_scorer(config.scorer, MODELS, out / STAGES / "answers", config.seed)


def _count_tokens(tokenizer: Tokenizer | None) -> Callable[[Sequence[str]], Sequence[int]] | None:
    return None if tokenizer is None else lambda texts: [len(ids) for ids in tokenizer.encode(texts)]


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
    """The ranks that torchrun started, as workers of the filter."""

    def __init__(self, world: World) -> None:
        self.world, self.rank, self.size = world, world.rank, world.size

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        total = torch.from_numpy(values.copy())
        torch.distributed.all_reduce(total)
        return total.numpy()

    def agree(self, error: LeviathanError | None) -> None:
        errors: list[LeviathanError | None] = [None] * self.size
        torch.distributed.all_gather_object(errors, error)
        for found in filter(None, errors):
            found.everywhere = True
            raise found


def _processes(config: FilterConfig, out: Path) -> int:
    """Run `torchrun --nproc-per-node N -m launch.verbs.filter` in this process."""
    from launch.agent import AgentInterrupted, Node
    from launch.agent import run as run_node

    with tempfile.TemporaryDirectory(prefix="leviathan-") as scratch:
        path = Path(scratch) / "config.json"
        write_json(path, plain(config))
        command = ("-m", "launch.verbs.filter", "--config", str(path))
        try:
            code = run_node(Node(command=command, ranks=config.processes, logs=out / "logs", job="filter"))
            return 1 if code == CRASHED else code
        except AgentInterrupted as error:
            return error.exit_code


def main(arguments: list[str]) -> int:
    """Run the filter in one of several processes."""
    if arguments[:1] == ["--config"]:
        return run(build(FilterConfig, read_json(Path(arguments[1]))))
    return run(load("filter", FilterConfig, arguments))


if __name__ == "__main__":
    if not sys.flags.safe_path and Path.cwd().resolve() != Path(__file__).resolve().parents[2]:
        del sys.path[0]
    from core.process import run_process

    sys.exit(run_process(main))
