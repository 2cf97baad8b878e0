"""The towers that a run's configuration describes."""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig
from model.flops import count_parameters
from model.roles import ParameterInfo
from model.tensor_source import parameter_infos
from parallel.vision.towers import TowersConfig
from train.config import Objective, TrainConfig


def towers_config(config: TrainConfig) -> TowersConfig:
    first = config.training.contrastive.loss.first
    return TowersConfig(config.model, config.training.contrastive.feature_size, first.log_scale, first.bias)


def run_parameters(config: TrainConfig) -> dict[str, ParameterInfo]:
    """Return every parameter that a run of any objective trains, without allocating memory for it."""
    match config.training.objective:
        case Objective.language:
            return parameter_infos(config.model)
        case Objective.contrastive:
            return towers_config(config).infos()


def num_parameters(config: TrainConfig) -> int:
    match config.training.objective:
        case Objective.language:
            return count_parameters(config.model).total
        case Objective.contrastive:
            return sum(info.shape.numel() for info in run_parameters(config).values())


def costs_like(config: TrainConfig) -> ModelConfig:
    """Return the language model whose FLOPs per token and tile are those of what the run trains. The head of
    contrastive towers leads to features; positions of pictures, which their decoder does not read, are counted.
    """
    match config.training.objective:
        case Objective.language:
            return config.model
        case Objective.contrastive:
            return replace(config.model, vocab_size=config.training.contrastive.feature_size)
