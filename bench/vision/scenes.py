"""Ask a trained model about held-out counted scenes: `python -m bench.vision.scenes RUN [--scenes 300]`.

The answers are decoded greedily, token by token, as `generate` does, and read as text. The same questions with another
scene's picture and with a black one show what the text alone gives away.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from core.errors import ConfigError
from data.images.generated.scenes import NUMBERS, Scene, SceneConfig, held_out, scene
from data.images.generated.sources import Scenes
from parallel.comm.world import World
from train.eval.lm_eval import HarnessModel, open_scoring_model
from train.exam.pictures import ShownPicture, black_picture
from train.run_directory import load_config

LONGEST = 24
"""Most tokens of an answer."""


def scenes_of(run: Path) -> SceneConfig:
    """Return the settings of the scenes that the run was trained on. Raises `ConfigError` if there are none."""
    for source in load_config(run).data.sources.values():
        if source.kind == "data.images.generated.sources:Scenes":
            return Scenes(**source.options).config
    raise ConfigError("RUN", str(run), "was not trained on counted scenes (kind=data.images.generated.sources:Scenes)")


def number(text: str) -> int | None:
    """Return the number that an answer to a question is, or the first and largest of a caption; None without one."""
    word = text.split()[0] if text.split() else ""
    if re.fullmatch(r"\d", word):
        return int(word)
    return 0 if word == "nothing" else NUMBERS.index(word) if word in NUMBERS else None


def picture(asked: list[Scene], place: int, shown: ShownPicture) -> bytes:
    match shown:
        case ShownPicture.own:
            return asked[place].png
        case ShownPicture.other:
            others = asked[place + 1 :] + asked[:place]
            return next(other for other in others if other.count != asked[place].count).png
        case ShownPicture.black:
            return black_picture(asked[place].size)


def answers(model: HarnessModel, asked: list[Scene], shown: ShownPicture) -> list[str]:
    """Return the model's greedy answer to each scene's prompt."""
    options = {"max_gen_toks": LONGEST, "do_sample": False}
    requests = []
    for place, one in enumerate(asked):
        arguments: Any = (f"<image>{one.prompt}", options, {"visual": [picture(asked, place, shown)]})
        requests.append(Instance("generate_until", {}, arguments, place))
    return model.generate_until(requests)


def figures(asked: list[Scene], found: list[str]) -> dict[str, float]:
    """Return the shares of answers with the right number, within one of it, and wholly right."""
    counted = [(number(text), number(one.target) or 0) for one, text in zip(asked, found, strict=True)]
    return {
        "exact number": share(said == count for said, count in counted),
        "within one": share(said is not None and abs(said - count) <= 1 for said, count in counted),
        "whole answer": share(text.strip() == one.target for one, text in zip(asked, found, strict=True)),
    }


def share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--scenes", type=int, default=300, help="number of held-out scenes")
    chosen = parser.parse_args()
    config = scenes_of(chosen.run)
    asked = [scene(held_out(index), config) for index in range(chosen.scenes)]
    model = HarnessModel(open_scoring_model(chosen.run, World(0, 1, torch.device("cpu"))), 1)
    print(f"{chosen.scenes} held-out scenes, task {config.task.value}, at most {config.distractors} distractors")
    for shown in ShownPicture:
        found = figures(asked, answers(model, asked, shown))
        print(
            f"{shown.value:>6} picture: " + ", ".join(f"{name} {value:.1%}" for name, value in found.items()),
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
