"""What a run's configuration costs, for each objective."""

from __future__ import annotations

from dataclasses import replace

from model.config import ModelConfig
from model.flops import count_parameters
from train.config import Objective, TrainConfig, run_parameters


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
