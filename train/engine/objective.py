"""Make the engine for what a run trains: see `train.config.Objective`."""

from __future__ import annotations

import torch

from core.errors import ConfigError
from data.config import Packing
from data.corpus import Corpus
from parallel.mesh import Meshes
from parallel.parallelize import build
from parallel.vision.towers import build_towers
from train.config import Objective, TrainConfig, check_pairs, towers_config
from train.contrastive.engine import ContrastiveEngine, PairTokens
from train.engine import make_engine
from train.engine.base import Engine


def objective_engine(config: TrainConfig, corpus: Corpus, meshes: Meshes, device: torch.device) -> Engine:
    """Build, distribute and initialise what the run trains. Raises `ConfigError` if the corpus does not suit it."""
    seed, frozen = config.run.seed, config.training.frozen
    match config.training.objective:
        case Objective.language:
            if corpus.has_pairs:
                raise ConfigError("data.tokens", config.data.tokens, "holds pairs for training.objective=contrastive")
            placed = build(config.model, config.precision, meshes, device, seed, frozen)
            return make_engine(placed, config.optimizer, seed)
        case Objective.contrastive:
            towers = build_towers(towers_config(config), config.precision, meshes, device, seed, frozen)
            loss = config.training.contrastive.loss
            return ContrastiveEngine(towers, config.optimizer, loss, pair_tokens(corpus, config))


def pair_tokens(corpus: Corpus, config: TrainConfig) -> PairTokens:
    """Return the ids that tell captions from pictures. Raises `ConfigError` if the corpus has no pairs of one tile."""
    if not corpus.has_pairs or corpus.images is None:
        reason = "has no image-caption pairs: tokenise with data.packing=pairs"
        raise ConfigError("data.tokens", config.data.tokens, reason, [f"data.packing={Packing.pairs.name}"])
    check_pairs(corpus.images.tiles, config.training.seq_len)
    return PairTokens(tuple(vars(corpus.images.ids).values()), corpus.tokenizer.eos_id)
