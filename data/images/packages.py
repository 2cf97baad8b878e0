"""Say how to install an optional package that is missing."""

from __future__ import annotations

from importlib import import_module

from core.errors import ConfigError


def require(module: str, package: str, extra: str) -> None:
    """Raise `ConfigError` with the line that installs the package, unless `module` can be imported."""
    try:
        import_module(module)
    except ImportError:
        raise ConfigError("", None, f"needs {package}: pip install 'leviathan[{extra}]'") from None
