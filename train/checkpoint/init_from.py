"""Load initial weights from runs, imported models or models in the Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from core.config import differences, plain
from core.errors import CheckpointError, ConfigError
from data.tokenizer import vocabulary_of_file
from model.config import FeedForward, ModelConfig
from model.huggingface import HuggingFaceCheckpoint, model_differences
from model.roles import GROUPS, ParameterInfo, Role
from model.tensor_source import PartSources, Shape, TensorSource, copy_buffers, parameter_infos, selection_biases
from model.upcycle import Upcycled, keeps_the_function
from train.checkpoint.index import check_run, read_progress
from train.checkpoint.reader import IMPORTED, TOKENIZER, CheckpointedModel, load_imported
from train.config import TrainConfig, phase_of, run_parameters
from train.run_directory import RunDirectory, committed, load_config


def open_model(path: Path, text_only: bool = False) -> TensorSource:
    """Open the model in a directory: a run's newest checkpoint, an imported model or a Hugging Face model. That of a
    contrastive run has the towers' parameters: its encoder has the names of a language model's, its decoder others.
    """
    if not path.is_dir():
        raise ConfigError("", str(path), "no such directory")
    if (path / IMPORTED).exists():
        imported = load_imported(path)
        return _newest(path / "checkpoints", lambda step: imported)
    if (path / "config.yaml").exists():
        config = load_config(path)
        checkpoints = RunDirectory(path, config.checkpoint.directory).checkpoints
        check_run(config, checkpoints)
        shapes = {name: tuple(info.shape) for name, info in run_parameters(config).items()}
        return _newest(checkpoints, lambda step: phase_of(config, step).model, shapes)
    return HuggingFaceCheckpoint(path, text_only)


def run_source(config: TrainConfig, log: Callable[[str], None]) -> TensorSource | None:
    """Open the models whose weights a new run starts with: see `initial_source`."""
    infos = run_parameters(config) if config.model.init_parts.any else None
    return initial_source(config.model, config.run.seed, log, config.training.frozen, infos)


def initial_source(
    config: ModelConfig,
    seed: int,
    log: Callable[[str], None],
    frozen: AbstractSet[Role] = frozenset(),
    infos: Mapping[str, ParameterInfo] | None = None,
) -> TensorSource | None:
    """Open the model of `model.init_from`, upcycled if configured, or the models of `model.init_parts`.

    `infos`: the parameters of the network; None: those of a language model. Raises `ConfigError` if a network differs,
    or if a projector of the `frozen` roles is of no model.
    """
    if config.init_parts.any:
        return _initial_parts(config, infos or parameter_infos(config), log, frozen)
    if config.init_from is None:
        return None
    source = _open("model.init_from", config.init_from)
    if not _has_decoder(source):
        raise ConfigError("model.init_from", config.init_from, "has no decoder: it is a contrastive run")
    target = config
    if config.upcycle is not None:
        if any(layer.feed_forward is FeedForward.moe for layer in source.config.blocks):
            raise ConfigError("model.upcycle", None, "init_from is a mixture-of-experts model already; remove upcycle")
        target = replace(config, layer_list=[replace(b, feed_forward=FeedForward.dense) for b in config.blocks])
        if all(layer.feed_forward is FeedForward.moe for layer in config.blocks):
            target = replace(target, dense_hidden_size=source.config.dense_hidden_size)
    _check_equal("model.init_from", config.init_from, "network", model_differences(source.config, target))
    if config.upcycle is not None:
        try:
            source = Upcycled(source, config, seed)
        except ConfigError as error:
            raise error.under("model") from None
        kept = "computes what the dense model does" if keeps_the_function(config) else "starts near the dense model"
        log(f"upcycled {config.init_from} by {config.upcycle.method.value}: {kept}")
    else:
        log(f"initial weights from {config.init_from}")
    return source


def _initial_parts(
    config: ModelConfig, infos: Mapping[str, ParameterInfo], log: Callable[[str], None], frozen: AbstractSet[Role]
) -> PartSources:
    """Open the models of `model.init_parts`. The parameters of a part without a model are missing."""
    parts = config.init_parts
    decoder = _decoder_part(config, infos, parts.decoder, log) if parts.decoder else {}
    vision = _vision_part(config, infos, parts.vision, log, frozen) if parts.vision else {}
    return PartSources(config, {**decoder, **vision})


def _decoder_part(
    config: ModelConfig, infos: Mapping[str, ParameterInfo], path: str, log: Callable[[str], None]
) -> dict[str, TensorSource]:
    key = "model.init_parts.decoder"
    source = _open(key, path)
    if not _has_decoder(source):
        raise ConfigError(key, path, "has no decoder")
    theirs, ours = (replace(model, vision=None) for model in (source.config, config))
    _check_equal(key, path, "decoder", model_differences(theirs, ours))
    log(f"initial weights of the decoder from {path}")
    return dict.fromkeys(_part(infos, "decoder"), source)


def _vision_part(
    config: ModelConfig,
    infos: Mapping[str, ParameterInfo],
    path: str,
    log: Callable[[str], None],
    frozen: AbstractSet[Role],
) -> dict[str, TensorSource]:
    """Return the source of each parameter of the encoder. A projector is not read if it leads to another width, or to a
    decoder in one network and to the features of contrastive towers in the other.
    """
    key, names = "model.init_parts.vision", _part(infos, "vision")
    if config.vision is None:
        raise ConfigError(key, path, "this model has no vision encoder: set model.vision")
    source = _open(key, path)
    if source.config.vision is None:
        raise ConfigError(key, path, "has no vision encoder")
    different = differences(plain(source.config.vision), plain(config.vision))
    different.pop("image_token_id", None)  # belongs to the vocabulary
    _check_equal(key, path, "encoder", {f"vision.{name}": pair for name, pair in different.items()})
    log(f"initial weights of the encoder from {path}")
    projector = next(info for info in names.values() if info.role is Role.projector)
    same_kind = _has_decoder(source) == ("embedding.weight" in infos)
    if not same_kind or source.shapes[projector.name] != tuple(projector.shape):
        if Role.projector in frozen:
            reason = f"has no projector to this network's {projector.shape[0]} columns, so it must be trained"
            advice = "leave the projector out of training.freeze"
            raise ConfigError(key, path, f"{reason}: {advice}", ["training.freeze=[encoder]"])
        log(f"{projector.name} {list(projector.shape)} starts as in a new model: {path} has no such projector")
        del names[projector.name]
    return dict.fromkeys(names, source)


def _has_decoder(source: TensorSource) -> bool:
    return "embedding.weight" in source.shapes


def _part(infos: Mapping[str, ParameterInfo], group: str) -> dict[str, ParameterInfo]:
    return {name: info for name, info in infos.items() if info.role in GROUPS[group]}


def _open(key: str, path: str) -> TensorSource:
    try:
        return open_model(Path(path).expanduser())
    except ConfigError as error:
        raise error.under(key) from None


def _check_equal(key: str, path: str, what: str, different: dict[str, tuple[Any, Any]]) -> None:
    """Raise `ConfigError` with the list of differences, unless it is empty."""
    if different:
        listed = "; ".join(f"model.{name}={has} there, {wanted} here" for name, (has, wanted) in different.items())
        if any(name.startswith("multipliers.") for name in different):
            listed += "; use hparam=none to keep the model's own multipliers"
        raise ConfigError(key, path, f"is another {what}: {listed}")


def copy_selection_biases(model: nn.Module, source: TensorSource, log: Callable[[str], None]) -> None:
    """Copy the routers' selection biases, which are buffers, from `source`."""
    biases = selection_biases(_decoder_source(source))
    copy_buffers(model, biases)
    if any(bias_E.any() for bias_E in biases.values()):
        log("the routers' selection biases are copied")


def compare_vocabularies(source: TensorSource, ours: str, log: Callable[[str], None]) -> None:
    """Log whether the initial decoder was trained with this run's vocabulary, whose fingerprint is `ours`."""
    decoder = _decoder_source(source)
    if decoder is None:
        return
    theirs = _vocabulary(decoder)
    if theirs is None:
        log("initial weights: their tokenizer is unknown; ids must mean the same tokens (data.tokenizer)")
    elif theirs != ours:
        log(
            f"initial weights: they were trained with another tokenizer ({theirs[:12]}) than this run's ({ours[:12]}); "
            "ids must mean the same tokens (data.tokenizer)"
        )
    else:
        log(f"initial weights: trained with this run's tokenizer ({ours[:12]})")


def _decoder_source(source: TensorSource) -> TensorSource | None:
    return source.sources.get("embedding.weight") if isinstance(source, PartSources) else source


def _vocabulary(source: TensorSource) -> str | None:
    if isinstance(source, Upcycled):
        return _vocabulary(source.dense)
    if isinstance(source, HuggingFaceCheckpoint):
        return vocabulary_of_file(source.directory / "tokenizer.json")
    assert isinstance(source, CheckpointedModel)
    imported = source.checkpoint.parent.parent
    if (imported / IMPORTED).exists():
        return vocabulary_of_file(imported / TOKENIZER / "tokenizer.json")
    return read_progress(source.checkpoint).get("vocabulary")


def _newest(
    checkpoints: Path, model: Callable[[int], ModelConfig], shapes: dict[str, Shape] | None = None
) -> TensorSource:
    """Open the newest checkpoint. `model` returns the configuration of the model for a checkpoint's step. `shapes`: as
    in `CheckpointedModel`.
    """
    present = committed(checkpoints)
    if not present:
        raise CheckpointError(f"{checkpoints} has no checkpoint yet")
    return CheckpointedModel(present[-1].path, model(present[-1].step), shapes)
