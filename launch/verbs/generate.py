"""The verb `generate`: continue a text with a run's last checkpoint."""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from train.eval.config import GenerateConfig


def run(config: GenerateConfig) -> int:
    """Print the prompt and its continuation."""
    from parallel.comm.world import connect
    from train.checkpoint.restore import restore
    from train.eval.contamination import MODELS
    from train.eval.generate import continue_tokens, placed_logits

    with closing(connect()) as world:
        restored = restore(Path(config.run), world, config.backend, MODELS)
        tokenizer = restored.tokenizer
        prompt = [tokenizer.bos_id, *tokenizer.encode([config.prompt])[0]]
        restored.placed.model.eval()
        next_logits = partial(placed_logits, restored.placed)
        tokens = list(continue_tokens(next_logits, prompt, restored.phase.seq_len, config, tokenizer.eos_id, world))
        if world.is_main:
            sys.stdout.write(config.prompt + tokenizer.decode(tokens) + "\n")
        return 0
