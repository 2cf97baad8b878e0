"""Typed configuration: Hydra composes YAML files and overrides, and frozen dataclasses validate the result.

Hydra cannot merge into frozen dataclasses, so each has a schema: a mutable dataclass with the same fields, which
rejects unknown keys and wrong types. `build` then makes the real objects, whose `__post_init__` rejects invalid values.
A component raises `ConfigError` with a key relative to itself; `build` prepends the path.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import math
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError, RenamedKeyError
from core.import_path import check_form
from core.overrides import LARGEST, escaped, parse
from core.renamed import new_value, old_fields

T = TypeVar("T")
_NO_VALUE = "has no value: give one"
# Hydra's launchers, sweepers and logging are not used here; composing them would take a quarter of the time of `load`
ConfigStore.instance().store(group="hydra", name="config", node=HydraConf(defaults=[]), provider="hydra")


def config_directory() -> Path:
    """Return the directory of the packaged `configs/`, in a checkout or a wheel."""
    import configs

    return Path(configs.__file__).parent


def load(root: str, schema: type[T], overrides: Sequence[str]) -> T:
    """Compose `configs/<root>.yaml` with `overrides` and return it as `schema`.

    The defaults list of the root file must begin with `<root>_schema`.
    """
    return build(schema, _compose(root, schema, overrides))


def load_stored(values: dict[str, Any], schema: type[T], overrides: Sequence[str]) -> T:
    """Apply `overrides` to a complete configuration, given as plain values, and return it as `schema`."""
    for key, _, value in (one.partition("=") for one in overrides):
        if isinstance(values.get(key), dict) and not value.startswith("{"):
            reason = "a stored configuration has no groups to choose from; set a key of this section"
            raise ConfigError(key, value, reason, [f"{key}.{next(iter(values[key]), 'KEY')}=..."])
    ConfigStore.instance().store(name="stored", node=_literal(values))
    return build(schema, _compose("stored", schema, overrides))


def groups() -> dict[str, list[str]]:
    """Return the configuration groups with the names of their presets."""
    return _groups_in(config_directory())


@cache
def _groups_in(directory: Path) -> dict[str, list[str]]:
    folders = (path for path in sorted(directory.iterdir()) if path.is_dir())
    found = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    return {name: presets for name, presets in found.items() if presets}


def compose_plain(root: str, schema: type, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the composed configuration as plain values: enums by name, and "???" for a mandatory key that is unset."""
    return typing.cast(dict[str, Any], plain(OmegaConf.to_container(_compose(root, schema, overrides), resolve=True)))


def build(cls: type[T], values: Any, path: str = "") -> T:
    """Check plain values, as YAML gives them, and make an instance of `cls`. `path`: prefix of keys in errors."""
    try:
        if isinstance(values, DictConfig):
            # plain values: after a "+key=" override, merging the DictConfig would accept unknown keys
            values = OmegaConf.to_container(values, resolve=True)
        shorthand = getattr(cls, "SHORTHAND", None)  # the key that a plain string sets
        if shorthand is not None and isinstance(values, str):
            values = {shorthand: values}
        if not isinstance(values, dict):
            raise ConfigError(path, values, "needs keys and values, not one value")
        _check_shape(cls, values, path)
        typed = OmegaConf.merge(_structured(typing.cast(Any, cls)), _literal(values))
        container = OmegaConf.to_container(typed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        explained = _explain(error, cls, path)
        raise (explained.under(path) if path else explained) from None
    return _make(cls, container, path)


def _literal(values: Any) -> Any:
    """Return plain values that OmegaConf resolves to `values`. Text of a stranger is not interpolated."""
    if isinstance(values, dict):
        return {key: _literal(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_literal(value) for value in values]
    return escaped(values) if isinstance(values, str) else values


def plain(config: Any) -> Any:
    """Return a dataclass tree as dicts, lists and scalars, with enums by name, as stored in `config.yaml`."""
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def absolute(config: T) -> T:
    """Return a dataclass tree in which every existing local path in a field with the metadata `path` is absolute. In a
    list, `path` is the suffix of the entries that are paths.

    URLs and names that are no path here, such as those of hubs, stay. A stored configuration then works in any folder.
    """
    changed: dict[str, Any] = {}
    for one in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, one.name)
        if one.metadata.get("path") and isinstance(value, str) and "://" not in value:
            path = os.path.expanduser(value)
            if glob.has_magic(path) or os.path.exists(path):
                changed[one.name] = os.path.abspath(path)
        elif dataclasses.is_dataclass(value):
            changed[one.name] = absolute(value)
        elif isinstance(value, dict):
            changed[one.name] = {k: absolute(v) if dataclasses.is_dataclass(v) else v for k, v in value.items()}
        elif isinstance(value, list) and (suffix := one.metadata.get("path")):
            paths = [os.path.expanduser(entry) for entry in value]
            changed[one.name] = [
                os.path.abspath(path) if path.endswith(suffix) and os.path.exists(path) else entry
                for entry, path in zip(value, paths, strict=True)
            ]
        elif isinstance(value, list):
            changed[one.name] = [absolute(v) if dataclasses.is_dataclass(v) else v for v in value]
    changed = {name: value for name, value in changed.items() if value != getattr(config, name)}
    return dataclasses.replace(typing.cast(Any, config), **changed) if changed else config


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return every leaf at which two plain trees differ, as path -> (old, new); a missing leaf is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


def _compose(root: str, schema: type, overrides: Sequence[str]) -> DictConfig:
    """Compose `root` (a YAML file or a stored node) with `overrides`. If neither exists, compose the schema instead."""
    store = ConfigStore.instance()
    known = store.repo.get(f"{root}_schema.yaml")
    if known is None or OmegaConf.get_type(known.node) is not _twin(schema):
        store.store(name=f"{root}_schema", node=_twin(schema))
    if f"{root}.yaml" not in store.repo and not (config_directory() / f"{root}.yaml").exists():
        root = f"{root}_schema"
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return compose(root, overrides=[parse(override, groups())[0] for override in overrides])
    # ValueError and TypeError: a name as a place in a list; OverflowError: a large whole number for a float
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise _explain(error, schema) from None


@cache
def _twin(cls: type) -> type:
    """Make the schema that Hydra merges into: a mutable dataclass with the fields of `cls` and no `__post_init__`."""
    hints = typing.get_type_hints(cls)
    fields = []
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        kind = _twin_type(hints[f.name])
        if dataclasses.is_dataclass(kind):
            has_values = dataclasses.is_dataclass(f.default)  # of its own, which may differ from those of its class
            made = partial(_twin_made, kind, f.default) if has_values else kind
            default: Any = dataclasses.field(default_factory=typing.cast(Any, made))
        elif f.default_factory is not dataclasses.MISSING:
            # plain values, because a frozen component would make its part of the schema read-only
            default = dataclasses.field(default_factory=partial(_plain_made, f.default_factory))
        elif f.default is not dataclasses.MISSING:
            default = dataclasses.field(default=plain(f.default) if _open_enum(hints[f.name]) else f.default)
        else:
            default = dataclasses.field(default="???")
        fields.append((f.name, kind, default))
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)


@cache
def _structured(cls: type) -> DictConfig:
    """Return the schema as a configuration. Do not change it: `OmegaConf.merge` changes a copy."""
    return OmegaConf.structured(_twin(cls))


def _twin_made(twin: Any, default: Any) -> Any:
    """Make a twin with the values of a component."""
    values = {f.name: (f.type, getattr(default, f.name)) for f in dataclasses.fields(twin)}
    return twin(
        **{
            name: _twin_made(kind, value)
            if dataclasses.is_dataclass(kind)
            else value
            if isinstance(value, Enum) and kind is not str
            else plain(value)
            for name, (kind, value) in values.items()
        }
    )


def _plain_made(factory: Callable[[], Any]) -> Any:
    return plain(factory())


def _twin_type(kind: Any) -> Any:
    """Return the type that the schema gives to a field of type `kind`.

    Components inside lists and dicts have type Any, because Hydra cannot add a typed entry by "+sources.mine.path=...".
    Optional components have type Any, because Hydra cannot set a key of a typed null. `build` checks all of them.
    """
    if dataclasses.is_dataclass(kind):
        return _twin(typing.cast(type, kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if not arguments:
        return kind
    if origin in (list, dict):
        arguments = tuple(Any if dataclasses.is_dataclass(a) else a for a in arguments)
    if _open_enum(kind) is not None:
        return str
    if origin in (typing.Union, types.UnionType):
        if any(dataclasses.is_dataclass(a) for a in arguments):
            return Any
        arguments = tuple(_twin_type(a) for a in arguments)
        return typing.Union[arguments]  # noqa: UP007 - built from a tuple
    return origin[tuple(_twin_type(a) for a in arguments)]  # type: ignore[index]


def _open_enum(kind: Any) -> type[Enum] | None:
    """Return the enum of a type `SomeEnum | str` (a name of the enum, or an import path), or None for other types."""
    match typing.get_args(kind):
        case (type() as names, other) if issubclass(names, Enum) and other is str:
            return names
    return None


def _make(kind: Any, value: Any, path: str) -> Any:
    _check_scalar(value, path)
    if value is None or kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        parts = {name: _make(hints[name], part, f"{path}.{name}" if path else name) for name, part in value.items()}
        try:
            return typing.cast(Any, kind)(**parts)
        except ConfigError as error:
            raise (error.under(path) if path else error) from None
    if (names := _open_enum(kind)) is not None:
        if value not in names.__members__:
            check_form(value, path, list(names.__members__))
        return names.__members__.get(value, value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        return _entry(kinds[0], value, path) if len(kinds) == 1 else value  # a union of scalars, checked by the schema
    if origin is list:
        return [_entry(arguments[0], part, f"{path}.{i}") for i, part in enumerate(value)]
    if origin is dict:
        return {key: _entry(arguments[1], part, f"{path}.{key}") for key, part in value.items()}
    return value


def _check_shape(kind: Any, value: Any, path: str) -> None:
    """Reject a value where keys and values or a list must be, and the reverse. OmegaConf's own errors lack the key."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else kind
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for name, part in value.items():
            if name in hints:
                _check_shape(hints[name], part, f"{path}.{name}" if path else name)
        return
    _check_scalar(value, path)  # before OmegaConf, which overflows on a float key with an int of 400 digits
    if value == "???":  # OmegaConf would take the default
        raise ConfigError(path, None, _NO_VALUE)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType) or kind is Any or value is None:
        return
    wanted = dict if dataclasses.is_dataclass(kind) or origin is dict else list if origin is list else None
    if wanted is dict and not isinstance(value, dict) and not hasattr(kind, "SHORTHAND"):
        shown = None if isinstance(value, list) else value
        raise ConfigError(path, shown, "needs keys and values, not one value")
    if wanted is list and not isinstance(value, list | tuple):
        raise ConfigError(path, None, "needs a list: [A,B]")
    if wanted is None and isinstance(value, dict | list):
        raise ConfigError(path, None, f"needs one value, not a {'list' if isinstance(value, list) else 'dictionary'}")
    if kind is bool and not isinstance(value, bool | str):
        raise ConfigError(path, value, "must be true or false")


def _check_scalar(value: Any, path: str) -> None:
    """Reject values that no key can mean, whatever its type."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(path, None, f"must be at most {LARGEST:,}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, value, "must be a finite number")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(path, None, "must not contain a NUL character")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
        raise ConfigError(path, None, "holds half of a surrogate pair, which is not text")


def _entry(kind: Any, value: Any, path: str) -> Any:
    return build(typing.cast(Any, kind), value, path) if dataclasses.is_dataclass(kind) else _make(kind, value, path)


def _explain(error: Exception, schema: type, path: str = "") -> ConfigError:
    """Turn an error of Hydra or OmegaConf into a `ConfigError` with a one-line message and a key relative to `path`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        first, *lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
        options = [line for line in lines if line and not line.endswith(":") and "search path" not in line.lower()]
        missing = re.search(r"Could not find '(?P<group>[^']*)/(?P<name>[^']*)'", first)
        if missing:
            return ConfigError(
                missing["group"], missing["name"], "no such choice", [o for o in options if " " not in o]
            )
        return ConfigError("configuration", None, first)
    key = str(getattr(cause, "full_key", None) or getattr(cause, "key", None) or "configuration")
    reason = str(getattr(cause, "msg", None) or cause).strip().splitlines()[0]
    if re.search(r"not in (struct|')", reason):
        parent, _, name = key.rpartition(".")
        owner = _kind_at(schema, parent)
        if (new := old_fields(owner, parent).get(name)) is not None:
            return RenamedKeyError(key, None, f"was renamed to {_joined(path, parent, new)}")
        node = getattr(cause, "parent_node", None)
        composed = [str(k) for k in node] if isinstance(node, DictConfig) and not node._is_none() else []
        if typing.get_origin(owner) is dict:
            near = [_joined(path, parent, n) for n in difflib.get_close_matches(name, composed, n=3, cutoff=0.5)]
            return ConfigError(key, None, "no such entry", [*near, f"+{key}=... to add one"])
        known = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else composed
        if name in known:
            return ConfigError(key, None, "is unset by default", [f"+{key}=... to set it"])
        renamed = old_fields(owner)
        near = difflib.get_close_matches(name, [*known, *renamed], n=3, cutoff=0.5)
        near = _same_name(name, owner) or list(dict.fromkeys(renamed.get(n, n) for n in near))
        return ConfigError(key, None, "no such key", [_joined(path, parent, n) for n in near or known])
    value = getattr(cause, "value", None)
    if re.search(r"is not Optional|is not a subclass of", reason):
        kind = _kind_at(schema, key)
        if dataclasses.is_dataclass(kind):
            inner = [f"{key}.{one.name}=..." for one in dataclasses.fields(kind)][:3]
            return ConfigError(
                key, value if value is not None else "null", "is a group of keys; set one of them", inner
            )
        reason = "must not be null" if value is None else reason
    if reason.startswith("Missing mandatory value"):
        owner = key.rpartition(".")[0]
        is_entry = typing.get_origin(_kind_at(schema, owner.rpartition(".")[0])) is dict
        return ConfigError(key, None, _NO_VALUE, [f"~{owner} to leave it out"] if is_entry else [])
    if (new := new_value(_kind_at(schema, key), value)) is not None:
        return RenamedKeyError(key, str(value), f"was renamed to {new}")
    is_whole = isinstance(value, float) and value.is_integer() and "Integer" in reason  # YAML reads 1e3 as a float
    legal = [int(typing.cast(float, value))] if is_whole else []
    return ConfigError(key, value if isinstance(value, str | int | float) else None, reason, legal)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _same_name(name: str, schema: Any, path: str = "", above: tuple[Any, ...] = ()) -> list[str]:
    """Return the keys below `schema` that end in `name`, or that are `name` without their dots and underscores.

    A component may contain another of its kind (`above`: those on the way); its keys are not repeated.
    """
    found: list[str] = []
    for one in dataclasses.fields(schema) if dataclasses.is_dataclass(schema) and schema not in above else ():
        key = _joined(path, one.name)
        if name == one.name or name == re.sub(r"[._]", "", key):
            found.append(key)
        found += _same_name(name, _kind_at(typing.cast(type, schema), one.name), key, (*above, schema))
    return found


def _kind_at(schema: type, path: str) -> Any:
    """Return the type declared at `path` below `schema`: X for `X | None`, and None if the path does not exist."""
    kind: Any = schema
    for name in filter(None, path.split(".")):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:
            kind = typing.get_args(kind)[-1] if typing.get_args(kind) else None
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
    return kind
