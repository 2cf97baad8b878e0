"""Read values of a `config.json` in the Hugging Face format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError
from model.config import MOST_LAYERS

Json = Mapping[str, Any]


def whole_number(config: Json, key: str, default: int | None = None) -> int:
    """Return the integer at `key`, or `default`. Without a default the key is required. Raises `ConfigError`."""
    value = config[key] if default is None else config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ConfigError(f"config.json {key}", str(value), "must be a whole number")
    return int(value)


def layer_count(config: Json, default: int | None = None) -> int:
    """Return `num_hidden_layers`, as `whole_number` does. More than a model can have would use up the memory."""
    layers = whole_number(config, "num_hidden_layers", default)
    if layers > MOST_LAYERS:
        raise ConfigError("config.json num_hidden_layers", layers, f"is more than the limit of {MOST_LAYERS:,}")
    return layers
