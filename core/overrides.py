"""Hydra's grammar of overrides, without its traps: values that it cannot parse are taken as text.

`run.name=<s>`, `data.sources.web.path=part=0/x.jsonl` and prompts need no quotes beyond those of the shell. A value
that begins like a list, a dictionary or a quoted string must be one.
"""

from __future__ import annotations

import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from core.errors import ConfigError, first_line

Groups = Mapping[str, Sequence[str]]
"""The names of the presets in each configuration group."""

MOST_RUNS = 10_000
LARGEST = 2**63 - 1
"""Largest whole number of a configuration: what an int64 holds."""
LONGEST_KEY = 200
_FORM = re.compile(r"(~|\+{0,2})([^=]*)(=?)(.*)", re.DOTALL)
_KEY = re.compile(r"[A-Za-z_]\w*([./@:-]\w+)*", re.ASCII)  # each character has one meaning: no backtracking
_STRUCTURED = ("[", "{", "'", '"')


def quoted(text: str) -> str:
    """Quote a string for Hydra's override grammar. A run of backslashes is tried once, from its beginning."""
    text = escaped(re.sub(r"(?<!\\)(\\*)'", r"\1\1\\'", text))
    return "'" + re.sub(r"(?<!\\)(\\+)\Z", r"\1\1", text) + "'"


def escaped(text: str) -> str:
    """Return text that OmegaConf resolves to `text`: `${` would begin an interpolation."""
    return re.sub(r"(?<!\\)(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)


def parse(override: str, groups: Groups, sweeps: bool = False) -> tuple[str, Override]:
    """Return the override in a form that Hydra parses, and parsed. Raises `ConfigError`.

    `sweeps`: whether `a,b` and `range(1,3)` are several values; otherwise they are text.
    """
    sign, key, equals, value = typing.cast(re.Match[str], _FORM.fullmatch(override)).groups()
    if not _KEY.fullmatch(key) or (not equals and sign != "~"):
        raise ConfigError("", None, f"{override!r} is not KEY=VALUE; keys are written as in model.hidden_size=256")
    if len(key) > LONGEST_KEY:  # Hydra looks for a folder of that name
        raise ConfigError("", None, f"{key[:40]}...: no such key; this one has {len(key)} characters")
    if re.match(r"hydra\b", key) and key != "hydra.searchpath":
        raise ConfigError(key, None, "has no effect here; remove it")
    try:
        parsed = _parse(override)
        if parsed.is_sweep_override() and not sweeps:
            raise HydraException("a sweep")
    except (HydraException, RecursionError, ValueError) as error:  # a number may have too many digits
        if value.startswith(_STRUCTURED):
            reason = f"cannot be parsed ({first_line(error)}); write text that begins with {value[0]} in quotes"
            raise ConfigError(key, None, f"{reason}: {key}={quoted(value)!r}") from None
        override = f"{sign}{key}={quoted(value)}"
        try:
            parsed = _parse(override)
        except (HydraException, RecursionError, ValueError) as again:
            raise ConfigError(key, None, f"cannot be parsed as a key and a value ({first_line(again)})") from None
    if parsed.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
        raise ConfigError(key, value, "has no definite values; list them, as in 1e-3,2e-3")
    if not parsed.is_sweep_override():
        _check_whole_numbers(key, parsed.value())
    if key in groups and sign != "~" and not (isinstance(parsed.value(), str) or parsed.is_sweep_override()):
        raise ConfigError(key, value, "must be the name of a preset", groups[key])
    if key in groups and len(value) > LONGEST_KEY and not parsed.is_sweep_override():
        raise ConfigError(key, value, "no such choice", groups[key])
    return override, parsed


def _check_whole_numbers(key: str, value: object) -> None:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_whole_numbers(key, one)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(key, None, f"must be at most {LARGEST:,}")


def expand(overrides: Sequence[str], groups: Groups) -> list[list[str]]:
    """Expand values such as `lr=1e-3,2e-3` into every combination of overrides. The last override varies fastest.

    Raises `ConfigError` for more than `MOST_RUNS` combinations.
    """
    choices = []
    for text, one in (parse(override, groups, sweeps=True) for override in overrides):
        if one.is_sweep_override():
            values = itertools.islice(one.sweep_string_iterator(), MOST_RUNS + 1)
            choices.append([f"{one.get_key_element()}={value}" for value in values])
        else:
            choices.append([text])
        if math.prod(map(len, choices)) > MOST_RUNS:
            raise ConfigError(str(one.key_or_group), None, f"makes more than {MOST_RUNS:,} runs; list fewer values")
    return [list(point) for point in itertools.product(*choices)]


def _parse(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
