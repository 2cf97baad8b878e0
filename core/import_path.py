"""Load a class or a function of the user's own package by its import path, `package.module:Name`.

Only what the user names on the command line is imported: never a path from a stored configuration.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from core.errors import ConfigError
from core.package_guard import PACKAGES, ROOT

FORM = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


def check_form(path: str, key: str, names: Sequence[str] = ()) -> None:
    """Raise `ConfigError` unless `path` looks like an import path. `names`: the other values that the key allows."""
    if not FORM.fullmatch(path):
        raise ConfigError(key, path, "must be an import path, module:Name" + (", or a known name" * bool(names)), names)


def check_options(kind: object, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if there are options but `kind` is not an import path."""
    if options and not isinstance(kind, str):
        raise ConfigError("options", None, "apply only to a kind that is an import path (my.module:Name)")


def load(
    path: str, key: str, *arguments: object, options: Mapping[str, Any] | None = None, base: type | None = None
) -> Any:
    """Import `path` and bind `options`. `arguments`: sample arguments that the signature must
    accept; `load` does not call the object.

    Raises `ConfigError` under `key` if the module cannot be imported or lacks the name, and if the object is not
    callable, is not a subclass of `base` or does not take the arguments.
    """
    found = _imported(path, key)
    if not callable(found):
        raise ConfigError(key, path, f"must be a class or a function, not a {type(found).__name__}")
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        wanted = "class" if base is object else f"subclass of {base.__module__}:{base.__name__}"
        raise ConfigError(key, path, f"must be a {wanted}")
    try:
        inspect.signature(found).bind(*arguments, **(options or {}))
    except (TypeError, ValueError) as error:
        names = f" and options {', '.join(options)}" if options else ""
        reason = f"cannot be called with {len(arguments)} arguments{names}: {error}"
        raise ConfigError(key, path, reason) from None
    return partial(found, **options) if options else found


def construct(
    path: str, key: str, *arguments: object, options: Mapping[str, Any] | None = None, needs: Sequence[str] = ()
) -> Any:
    """Import and instantiate a class. Raises `ConfigError` as `load` does, or if an attribute in `needs` is missing."""
    made = load(path, key, *arguments, options=options, base=object)(*arguments)
    if missing := [name for name in needs if not hasattr(made, name)]:
        raise ConfigError(key, path, f"must be a class with {', '.join(needs)}; {', '.join(missing)} is missing")
    return made


def _imported(path: str, key: str) -> Any:
    check_form(path, key)
    name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(key, path, f"cannot be imported: {error}") from None
        reason = f"no module {error.name!r}: install its package, or put its folder on PYTHONPATH, even the current one"
        raise ConfigError(key, path, reason, _places(name, attribute)) from None
    except Exception as error:  # whatever the user's module raises
        lines = str(error).splitlines() or [""]
        raise ConfigError(key, path, f"cannot be imported: {type(error).__name__}: {lines[0]}") from None
    if not hasattr(module, attribute):
        near = [f"{name}:{one}" for one in difflib.get_close_matches(attribute, vars(module), n=3)]
        raise ConfigError(key, path, f"{name} has no {attribute}", _places(name, attribute) or near)
    return getattr(module, attribute)


def _places(module: str, attribute: str) -> list[str]:
    """Return the current import paths of our class or function `attribute`, which may have been moved or renamed."""
    package = module.partition(".")[0]
    if package not in PACKAGES:
        return []
    pattern = re.compile(rf"^(?:class|def) ({re.escape(attribute)}(?:Callback)?)\b", re.MULTILINE)
    return [
        f"{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}:{found[1]}"
        for file in sorted((ROOT / package).rglob("*.py"))
        if (found := pattern.search(file.read_text()))
    ]
