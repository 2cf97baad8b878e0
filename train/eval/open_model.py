"""Open the model that a verb names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError, UnreadableFileError, first_line, printable
from core.files import read_json
from data.images.decode import decode
from model.huggingface import FAMILIES
from parallel.comm.shares import Shares
from parallel.comm.world import World
from precision.config import Backend
from train.checkpoint.reader import IMPORTED
from train.eval.contamination import MODELS
from train.eval.multimodal import PLACEHOLDER
from train.eval.scoring_model import ScoringModel, from_directory, from_run, from_transformers

_ADAPTER = "adapter_config.json"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def open_scoring_model(path: Path, world: World, backend: Backend | None = None) -> ScoringModel:
    """Open a run's model, an imported model or a Hugging Face model. Transformers opens a Hugging Face model of an
    architecture that is not ours. Models that are not runs compute in float32, those of transformers on a GPU in
    bfloat16, and every rank has the whole model.

    Raises `ConfigError` if `backend` is given for a model that is not a run.
    """
    if (path / "config.yaml").exists():
        return from_run(path, world, backend, MODELS)
    if backend is not None:
        reason = "applies to runs only: any other model is evaluated in float32, by PyTorch; remove it"
        raise ConfigError("backend", backend, reason)
    if not is_ours(path):
        return open_foreign(path, world)
    return replace(from_directory(path, world.device), shares=Shares(world, world.size, world.rank))


def is_ours(path: Path) -> bool:
    """Return whether our own network computes the model of a directory. True for one that cannot be read: opening it
    then says why.
    """
    if (path / IMPORTED).exists() or not (path / "config.json").exists():
        return True
    try:
        kind = read_json(path / "config.json", {"model_type": str})["model_type"]
    except (OSError, UnreadableFileError):
        return True
    return kind in FAMILIES


def open_foreign(path: Path, world: World) -> ScoringModel:
    """Open a directory of the Hugging Face format by transformers, in one process. Raises `ConfigError` (key `run`)."""
    if world.size > 1:
        raise ConfigError("launch.kind", None, "transformers computes this model, in one process: remove it")
    if (path / _ADAPTER).exists():  # it names a base model, which may be anywhere
        raise ConfigError("run", str(path), "is an adapter: merge it into its base model, and save the whole model")
    config = read_json(path / "config.json")
    if find_spec("transformers") is not None:
        from transformers import CONFIG_MAPPING
        from transformers.utils import logging

        logging.disable_progress_bar()
        if (kind := config.get("model_type")) not in CONFIG_MAPPING:  # transformers would warn before it refuses
            raise ConfigError("run", str(path), f"transformers cannot open it: it knows no model_type {kind!r}")
    has_encoder = "vision_config" in config and any((path / name).exists() for name in _PROCESSORS)
    try:
        if not has_encoder:
            return from_transformers(str(path), world.device)
        model = from_transformers(str(path), world.device, "AutoModelForImageTextToText")
    except ConfigError as error:
        raise error.under("run") from None
    return replace(model, open_pictures=partial(ProcessedPictures.open, path, model))


class ProcessedPictures:
    """A model of transformers with its processor, which turns pictures and text into its inputs. No chat template is
    applied.
    """

    def __init__(self, model: ScoringModel, processor: Any) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def open(cls, path: Path, model: ScoringModel) -> ProcessedPictures | str:
        """Return why if the processor cannot be opened, or has no token for pictures."""
        from transformers import AutoProcessor, GenerationConfig

        try:
            processor = AutoProcessor.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # OSError, ValueError, ImportError and others
            return printable(f"transformers cannot open its processor of pictures: {first_line(error)}")
        if not isinstance(getattr(processor, "image_token", None), str):
            return "its processor has no token for pictures (image_token)"
        network: Any = model.network
        network.generation_config = GenerationConfig()  # the model's own may change what is most probable
        return cls(model, processor)

    def read(self, text: str, pictures: Sequence[bytes]) -> tuple[int, Any]:
        prompt = text.replace(PLACEHOLDER, self.processor.image_token)
        images = [decode(content, f"picture {place}") for place, content in enumerate(pictures)]
        try:
            inputs = self.processor(text=prompt, images=images, return_tensors="pt")
        except Exception as error:  # such as a prompt that needs further tokens
            reason = f"its processor of pictures fails: {printable(first_line(error))}"
            raise ConfigError("run", None, reason) from error
        parameter = next(self.model.network.parameters())
        return inputs["input_ids"].shape[1], inputs.to(parameter.device, parameter.dtype)

    @torch.inference_mode()
    def continue_from(self, inputs: Any, tokens: int, goes_on: Callable[[list[int]], bool]) -> list[int]:
        network: Any = self.model.network
        begin, stop = inputs["input_ids"].shape[1], self.model.tokenizer.eos_id

        def ended(ids_BT: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([not goes_on(ids_BT[0, begin:].tolist())], device=ids_BT.device)

        limits = {"max_new_tokens": tokens, "eos_token_id": stop, "pad_token_id": stop, "stopping_criteria": [ended]}
        ids_BT = network.generate(**inputs, do_sample=False, **limits)
        found: list[int] = ids_BT[0, begin:].tolist()
        return found[:-1] if found[-1:] == [stop] else found
