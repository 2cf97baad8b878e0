"""The `leviathan` command: a verb and Hydra overrides.

Exit codes: 0 done, 1 failed, 2 wrong configuration (one line, no traceback), 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import ConfigError, LeviathanError
from core.openmp import share_cores
from core.package_guard import check_packages, drop_working_directory


@dataclass(frozen=True)
class Verb:
    """`root` names the YAML under configs/; `schema` and `function` are "module:name", imported when the verb runs.
    The function gets the typed configuration and returns the exit code; one that `sweeps` gets a list of them, one for
    each combination of values where the user gives several (optimizer.lr=1e-3,2e-3).
    """

    summary: str
    root: str
    schema: str
    function: str
    sweeps: bool = False
    positional: tuple[str, ...] = ()
    """Keys that arguments without "=" stand for, in order; "..." after the last makes it a list of the rest."""
    others: str | None = None
    """The key of a list that takes overrides of keys which the verb itself does not have: those of another verb."""
    stored: str | None = None
    """"module:name" of the function that reads a stored configuration and applies overrides: `--config FILE`."""


VERBS = {
    "train": Verb(
        "train a model",
        "train",
        "train.config:TrainConfig",
        "launch.local:train",
        sweeps=True,
        stored="launch.local:read_stored",
    ),
    "evaluate": Verb(
        "held-out loss of a run, or its figures in tasks (lm-eval)",
        "evaluate",
        "train.eval.held_out:EvaluateConfig",
        "train.eval.held_out:run",
        positional=("run",),
    ),
    "generate": Verb(
        "continue a text with a run's model",
        "generate",
        "train.eval.generate:GenerateConfig",
        "train.eval.generate:run",
        positional=("run", "prompt"),
    ),
    "tokenize": Verb(
        "make token shards of a corpus", "tokenize", "launch.verbs.tokenize:TokenizeConfig", "launch.verbs.tokenize:run"
    ),
    "filter": Verb(
        "leave out what is easy, broken or repeated, with an audit",
        "filter",
        "launch.verbs.filter:FilterConfig",
        "launch.verbs.filter:run",
        positional=("action",),
    ),
    "metap": Verb(
        "hyperparameters from a small model to a large one: transfer, check, sweep, fit",
        "metap",
        "launch.verbs.metap:MetapConfig",
        "launch.verbs.metap:run",
        positional=("action",),
        others="train",
    ),
    "import": Verb(
        "a checkpoint in the Hugging Face format, as a start for training",
        "import",
        "train.convert:ImportConfig",
        "train.convert:run_import",
        positional=("source", "out"),
    ),
    "export": Verb(
        "a run's model in the Hugging Face format",
        "export",
        "train.convert:ExportConfig",
        "train.convert:run_export",
        positional=("source", "out"),
    ),
    "certify": Verb(
        "prove that a layout computes what one process computes",
        "certify",
        "train.certify.plan:CertifyConfig",
        "launch.verbs.certify:run",
        positional=("run",),
    ),
    "report": Verb(
        "draw one run, or several side by side",
        "report",
        "launch.verbs.report:ReportConfig",
        "launch.verbs.report:run",
        positional=("runs...",),
    ),
    "jobs": Verb(
        "list, show or cancel this project's SLURM jobs",
        "jobs",
        "launch.slurm.jobs:JobsConfig",
        "launch.slurm.jobs:run",
        positional=("action", "job"),
    ),
    "doctor": Verb(
        "look at this machine and installation",
        "doctor",
        "launch.diagnose.doctor:DoctorConfig",
        "launch.diagnose.doctor:run",
    ),
}


_OVERRIDE = re.compile(r"~\S|\+{0,2}[A-Za-z_][\w./@:-]*=")
"""How Hydra's overrides begin; other arguments stand for the keys in `Verb.positional`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    drop_working_directory()
    share_cores()
    try:
        check_packages()
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        code = _run(arguments[0], arguments[1:])
        sys.stdout.flush()
        return code
    except LeviathanError as error:
        print(f"leviathan: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("leviathan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `leviathan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return 1


def usage() -> str:
    lines = ["usage: leviathan VERB [KEY=VALUE ...]", "", "verbs:"]
    lines += [f"  {name:<10} {verb.summary}" for name, verb in VERBS.items()]
    lines += [
        "",
        "leviathan VERB --help  lists the verb's keys; leviathan VERB --cfg [KEY=VALUE ...]  shows what it would run",
        "leviathan train --config RUN/config.yaml [KEY=VALUE ...]  starts from a stored configuration",
    ]
    return "\n".join(lines)


def _run(name: str, arguments: list[str]) -> int:
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.4) or list(VERBS)
        raise ConfigError("verb", name, "no such verb", near)
    verb = VERBS[name]
    stored, arguments = _stored(verb, arguments)
    options = [argument for argument in arguments if argument.startswith("-")]
    overrides = _named(verb, [argument for argument in arguments if not argument.startswith("-")])
    unknown = [option for option in options if option not in ("-h", "--help", "--cfg")]
    if unknown:
        raise ConfigError(unknown[0], None, "no such option; keys are written KEY=VALUE", ["--help", "--cfg"])
    schema = _import(verb.schema)
    overrides = _collected(verb, schema, overrides)
    from core.config import compose_plain, config_directory, expand, load, plain

    if "-h" in options or "--help" in options:
        from launch.config import LaunchConfig
        from launch.help import describe

        print(f"leviathan {name}: {verb.summary}\n")
        values = compose_plain(verb.root, schema, overrides)
        print(describe(schema, values, config_directory(), {"launch": LaunchConfig}))
        return 0
    grid = expand(overrides) if verb.sweeps else [overrides]
    read = partial(load, verb.root, schema) if stored is None else partial(_import(verb.stored or ""), stored)
    configs = [read(point) for point in grid]
    if "--cfg" in options:
        import yaml

        print(yaml.safe_dump_all([plain(config) for config in configs], sort_keys=False), end="")
        return 0
    function: Callable[..., int] = _import(verb.function)
    return function(configs) if verb.sweeps else function(configs[0])


def _stored(verb: Verb, arguments: list[str]) -> tuple[Path | None, list[str]]:
    """FILE of `--config FILE`, and the other arguments."""
    if verb.stored is None or "--config" not in arguments:
        return None, arguments
    at = arguments.index("--config")
    if len(arguments) == at + 1:
        raise ConfigError("--config", None, "name a stored configuration: --config RUN/config.yaml")
    return Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]


def _named(verb: Verb, arguments: list[str]) -> list[str]:
    """Arguments without "=" as overrides of the keys that they stand for."""
    bare = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    if not verb.positional:
        return arguments  # Hydra says what is wrong with them
    named, keys = [argument for argument in arguments if argument not in bare], list(verb.positional)
    from core.config import quoted

    values = [quoted(argument) for argument in bare]
    while values:
        if not keys:
            raise ConfigError(bare[-1], None, f"one argument too many; they are {' '.join(verb.positional)}")
        key = keys.pop(0)
        if key.endswith("..."):
            named.append(f"{key.removesuffix('...')}=[{','.join(values)}]")
            break
        named.append(f"{key}={values.pop(0)}")
    return named


def _collected(verb: Verb, schema: type, overrides: list[str]) -> list[str]:
    """Overrides of keys that `schema` does not have, as a list at `verb.others`."""
    if verb.others is None:
        return overrides
    from core.config import quoted

    own = {one.name for one in dataclasses.fields(schema)}
    theirs = [word for word in overrides if re.split(r"[.=@]", word.lstrip("+~"))[0] not in own]
    mine = [word for word in overrides if word not in theirs]
    return [*mine, f"{verb.others}=[{','.join(map(quoted, theirs))}]"] if theirs else mine


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
