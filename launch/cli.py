"""The `leviathan` command: a verb and Hydra overrides.

Exit codes: see `core/exit_codes.py` and docs/exit_codes.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from core.errors import ConfigError
from core.package_guard import sources_digest
from core.process import run_process


@dataclass(frozen=True)
class Verb:
    """One verb of the command. `configs/VERB.yaml` is the root of its configuration.

    `config` and `function` name a class and a function in launch/verbs/MODULE.py, which is imported when the verb runs.
    The function takes the typed configuration and returns the exit code. If the verb `sweeps`, keys may have several
    values (optimizer.lr=1e-3,2e-3), and the function takes a list with one configuration per combination.
    """

    config: str
    summary: str
    positional: tuple[str, ...] = ()
    """Keys that arguments without "=" set, in order. "..." after the last key collects the remaining arguments in a
    list.
    """
    sweeps: bool = False
    others: str | None = None
    """Key of the list that collects the overrides meant for another verb: those of keys that `config` does not have."""
    stored: str | None = None
    """Name of the function behind `--config FILE`, which reads a stored configuration and applies overrides."""
    check: str | None = None
    """Name of the function that checks and completes the list of configurations before `--cfg` shows them."""
    module: str | None = None
    """Name of the module. None: the verb's name."""
    function: str = "run"
    flags: tuple[str, ...] = ()
    """Keys that `--KEY` sets to true."""


VERBS = {
    "train": Verb("TrainConfig", "train a model", sweeps=True, stored="read_stored", check="checked"),
    "evaluate": Verb("EvaluateConfig", "held-out loss of a run, loss of a text, or results on lm-eval tasks", ("run",)),
    "generate": Verb("GenerateConfig", "continue a text with a run's model", ("run", "prompt")),
    "tokenize": Verb("TokenizeConfig", "make token shards of a corpus"),
    "filter": Verb("FilterConfig", "drop easy, broken and repeated documents, with an audit", ("action",)),
    "curate": Verb("CurateConfig", "choose image-caption pairs by MetaCLIP's curation, with an audit"),
    "metap": Verb("MetapConfig", "transfer hyperparameters from small to large models", ("action",), others="train"),
    "import": Verb(
        "ImportConfig",
        "convert a checkpoint in the Hugging Face format, to start training from it",
        ("source", "out"),
        module="convert",
        function="run_import",
    ),
    "export": Verb(
        "ExportConfig",
        "convert a run's model to the Hugging Face format",
        ("source", "out"),
        module="convert",
        function="run_export",
    ),
    "certify": Verb("CertifyConfig", "prove that a layout computes what one process computes", ("run",)),
    "plan": Verb("PlanConfig", "predict memory and step time; compare with published runs"),
    "dryrun": Verb("DryrunConfig", "run one step as any rank of a large job, without GPUs", others="train"),
    "report": Verb("ReportConfig", "plot one run, or several side by side", ("runs...",)),
    "watch": Verb(
        "WatchConfig",
        "show runs on the terminal while they train",
        ("runs...",),
        module="report",
        function="run_watch",
        flags=("once",),
    ),
    "jobs": Verb("JobsConfig", "list, show or cancel this project's SLURM jobs", ("action", "job")),
    "doctor": Verb("DoctorConfig", "check this machine and installation"),
}

_OVERRIDE = re.compile(r"~\S|\+{0,2}[A-Za-z_][\w./@:-]*=")
"""Matches the beginning of a Hydra override. Other arguments are values of the keys in `Verb.positional`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return run_process(_run, arguments)


def usage() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items())
    return f"""usage: leviathan VERB [KEY=VALUE ...]

verbs:
{verbs}

leviathan VERB --help  lists the verb's keys; leviathan VERB --cfg [KEY=VALUE ...]  prints the resulting configuration
leviathan train --config RUN/config.yaml [KEY=VALUE ...]  starts from a stored configuration
leviathan --version  shows the versions of the code and of torch"""


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("--version", "version"):
        print(f"leviathan {metadata.version('leviathan')}, code {sources_digest()}, torch {metadata.version('torch')}")
        return 0
    with suppress(UnicodeDecodeError):  # the locale may not be UTF-8, although the arguments are
        arguments = [os.fsencode(argument).decode() for argument in arguments]
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError("argument", ascii(argument), "is not UTF-8 text")
    name, *arguments = arguments
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.4) or list(VERBS)
        raise ConfigError("verb", name, "no such verb", near)
    verb = VERBS[name]
    stored, arguments = _stored(verb, arguments)
    given = {f"--{key}": f"{key}=true" for key in verb.flags}
    arguments = [given.get(argument, argument) for argument in arguments]
    options = [argument for argument in arguments if argument.startswith("-")]
    overrides = _named(verb, [argument for argument in arguments if not argument.startswith("-")])
    unknown = [option for option in options if option not in ("-h", "--help", "--cfg")]
    if unknown:
        reason = "no such option; keys are written KEY=VALUE"
        if "prompt" in verb.positional:
            reason += f", and a prompt that begins so {shlex.quote('prompt=' + unknown[0])}"
        raise ConfigError(unknown[0], None, reason, [*given, "--help", "--cfg"])
    module = importlib.import_module(f"launch.verbs.{verb.module or name}")
    schema = getattr(module, verb.config)
    overrides = _collected(verb, schema, overrides)
    from core.config import compose_plain, config_directory, groups, load, plain
    from core.overrides import expand

    if "-h" in options or "--help" in options:
        from launch.config import LaunchConfig, LocalLaunch
        from launch.help import describe

        print(f"leviathan {name}: {verb.summary}\n")
        launch = LaunchConfig if verb.sweeps else LocalLaunch
        print(describe(schema, compose_plain(name, schema, overrides), config_directory(), {"launch": launch}))
        return 0
    _check_prompt(verb, schema, overrides)
    read = partial(load, name, schema) if stored is None else partial(getattr(module, verb.stored or ""), stored)
    configs = [read(point) for point in (expand(overrides, groups()) if verb.sweeps else [overrides])]
    if "--cfg" in options:
        import yaml

        if verb.check is not None:
            configs = getattr(module, verb.check)(configs)
        print(yaml.safe_dump_all([plain(config) for config in configs], sort_keys=False), end="")
        return 0
    function: Callable[..., int] = getattr(module, verb.function)
    return function(configs) if verb.sweeps else function(configs[0])


def _stored(verb: Verb, arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return FILE of `--config FILE`, or None without this option, and the other arguments."""
    if verb.stored is not None:
        split = (word.split("=", 1) if word.startswith("--config=") else [word] for word in arguments)
        arguments = [part for parts in split for part in parts]
    if verb.stored is None or "--config" not in arguments:
        return None, arguments
    at = arguments.index("--config")
    if len(arguments) == at + 1:
        raise ConfigError("--config", None, "name a stored configuration: --config RUN/config.yaml")
    rest = arguments[:at] + arguments[at + 2 :]
    if "--config" in rest:
        raise ConfigError("--config", None, "name one stored configuration only")
    return Path(arguments[at + 1]), rest


def _named(verb: Verb, arguments: list[str]) -> list[str]:
    """Turn arguments without "=" into overrides of the keys that they stand for."""
    if not verb.positional:
        return arguments  # Hydra reports the error
    from core.overrides import quoted

    bare = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    values = list(map(quoted, bare))
    named = [_as_text(verb, argument) for argument in arguments if argument not in bare]
    for key in verb.positional[: len(values)]:
        if key.endswith("..."):
            return [*named, f"{key.removesuffix('...')}=[{','.join(values)}]"]
        named.append(f"{key}={values.pop(0)}")
    if values:
        raise ConfigError(bare[-1], None, f"is one argument too many; this verb takes {' '.join(verb.positional)}")
    return named


def _check_prompt(verb: Verb, schema: type, overrides: list[str]) -> None:
    """Raise `ConfigError` if what looks like an override may be the text that the verb takes last."""
    given = {_root(word): word for word in overrides}
    if verb.positional[-1:] != ("prompt",) or "prompt" in given:
        return
    known = {one.name for one in dataclasses.fields(schema)}
    for key, word in given.items():
        if key not in known:
            raise ConfigError(key, None, f"no such key; if this is the prompt, write 'prompt={word}'")


def _root(override: str) -> str:
    """Return the first part of an override's key."""
    return re.split(r"[.=@]", override.lstrip("+~"))[0]


def _as_text(verb: Verb, argument: str) -> str:
    """Quote the value of `prompt=...` and the like: what a positional key takes is text, not Hydra's grammar."""
    from core.overrides import quoted

    key, _, value = argument.partition("=")
    return f"{key}={quoted(value)}" if key in verb.positional and value != "null" else argument


def _collected(verb: Verb, schema: type, overrides: list[str]) -> list[str]:
    """Move overrides of keys that `schema` does not have into the list `verb.others`."""
    if verb.others is None:
        return overrides
    from core.overrides import quoted

    own = {one.name for one in dataclasses.fields(schema)}
    theirs = [word for word in overrides if _root(word) not in own]
    mine = [word for word in overrides if word not in theirs]
    return [*mine, f"{verb.others}=[{','.join(map(quoted, theirs))}]"] if theirs else mine


if __name__ == "__main__":
    sys.exit(main())
