"""The verb `generate`: continue a text with a run's last checkpoint."""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import cast

from core.errors import ConfigError
from launch.config import LaunchKind, local_launch
from launch.ranks import check_model, run_verb
from train.eval.config import GenerateConfig


def run(config: GenerateConfig) -> int:
    """Print the prompt and its continuation."""
    launch = local_launch(config.launch)
    is_run = check_model(config.run, config.backend)
    if launch.kind is LaunchKind.torchrun:
        return run_verb("generate", config, launch)
    from model.transformer import Transformer
    from parallel.comm.world import connect
    from train.checkpoint.restore import restore
    from train.corpus import run_images
    from train.eval.contamination import MODELS
    from train.eval.generate import NextLogits, continue_tokens, placed_images, placed_logits, placed_model
    from train.eval.pictures import picture_prompt
    from train.eval.scoring_model import TextTokenizer, from_directory

    path = Path(config.run).expanduser()
    with closing(connect()) as world:
        tokenizer: TextTokenizer
        pictures = None
        if is_run:
            restored = restore(path, world, config.backend, MODELS)
            placed = restored.placed
            placed.model.eval()
            tokenizer, context = restored.tokenizer, restored.phase.seq_len
            if config.images:
                pictures = picture_prompt(config.images, restored.config.model, run_images(path))
            next_logits: NextLogits = partial(placed_logits, placed, pictures=pictures)
            if (cached := placed_model(placed, context)) is not None:
                images = None if pictures is None else partial(placed_images, placed, pictures)
                next_logits = cached.next_logits(images)
        else:
            model = from_directory(path, world.device)
            tokenizer, context = model.tokenizer, model.context
            if config.images:
                pictures = picture_prompt(config.images, cast(Transformer, model.network).config, model.images)
            tiles = [] if pictures is None else [pictures.pixels_N3SS]
            next_logits = model.cached().next_logits(model.images_of(tiles))
        shown = [] if pictures is None else pictures.ids
        prompt = [tokenizer.bos_id, *shown, *tokenizer.encode([config.prompt])[0]]
        if shown and len(prompt) + config.tokens > context:
            reason = f"with {len(prompt)} tokens of pictures and prompt is more than the model's context of {context}"
            raise ConfigError("tokens", config.tokens, reason, [max(1, context - len(prompt))])
        tokens = list(continue_tokens(next_logits, prompt, context, config, tokenizer.eos_id, world))
        if world.is_main:
            sys.stdout.write(config.prompt + tokenizer.decode(tokens) + "\n")
        return 0
