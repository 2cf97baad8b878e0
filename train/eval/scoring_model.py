"""Open a model that returns the losses of given tokens, for the filter's scorers and for lm-eval's tasks.

The model is a run, an imported model, a directory in the Hugging Face format, or any model that transformers opens.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError, UnreadableFileError
from core.files import read_json, sha256_text
from data.filter.score.factory import Models
from data.images.media import ImageDescription
from data.tokenizer import JsonTokenizer
from model.attention.plan import ForwardContext
from model.head import IGNORED, token_losses
from model.huggingface import HuggingFaceCheckpoint
from model.tensor_source import TensorSource, materialise
from model.transformer import Transformer
from model.vision.config import CHANNELS
from model.vision.fusion import Images
from parallel.comm.shares import Shares
from parallel.comm.world import World
from parallel.fsdp import release
from parallel.parallelize import ParallelModel
from parallel.sharding import whole_state
from precision.config import Backend
from train.checkpoint.init_from import open_model
from train.checkpoint.reader import TOKENIZER, load_origin
from train.checkpoint.restore import restore
from train.corpus import run_images
from train.eval.generate import (
    CachedModel,
    Continuation,
    ImagesOf,
    NextLogits,
    WindowModel,
    batches,
    continue_batch,
    placed_model,
    sequence_logits,
    sequence_scores,
)
from train.eval.multimodal import place_tiles
from train.eval.pictures import exported_images

DEFAULT_CONTEXT = 2048
"""Context of a model whose configuration lacks `max_position_embeddings`."""
NO_ENCODER = "the model has no encoder, or no tokens, for pictures"


class TextTokenizer(Protocol):
    bos_id: int
    eos_id: int

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return the ids of each text, without BOS and EOS."""

    def decode(self, ids: Sequence[int]) -> str: ...


class PictureModel(Protocol):
    """A model with an encoder that is not ours, with its processor."""

    def read(self, text: str, pictures: Sequence[bytes]) -> tuple[int, Any]:
        """Return the number of tokens of a prompt, and the model's inputs. Each `<image>` in the text stands for the
        next picture. Raises `ConfigError` if the processor does not take them.
        """

    def continue_from(self, inputs: Any, tokens: int, goes_on: Callable[[list[int]], bool]) -> list[int]:
        """Return up to `tokens` new tokens by greedy decoding, until EOS or until no other one is wanted."""


@dataclass(frozen=True)
class TokenWindow:
    """Inputs `ids[:-1]` and labels `ids[1:]`; the last `counted` labels belong to text number `text`. `pixels_N3SS`:
    the tiles of the pictures in it, uint8.
    """

    text: int
    ids: list[int]
    counted: int
    pixels_N3SS: Tensor | None = None


@dataclass(frozen=True)
class ScoringModel:
    """A network with its tokenizer. `logits` returns [B, T, V] for token ids [B, T] (int64, on the host) and, for a
    model of ours, their `Images` or None; sequences begin at position 0. `scores`, which a model of ours has, returns
    the losses of labels and the ids of the likeliest tokens [B, T, 2] for token ids, labels and images, without whole
    logits. `context`: the longest sequence that the model
    was made for. `identity`: the kind of model, and everything else but the weights on which its losses depend.
    `read_images` returns how pictures become tokens and tiles, None for a model without pictures. `step`: that of
    a run's checkpoint.

    `shares`: how the ranks divide what the model is asked. All of them call `continue_all`, `losses` and `fingerprint`
    together, with the same arguments, and get the same results. `placed`: a network that is sharded over ranks.
    """

    network: nn.Module
    logits: Callable[..., Tensor]
    tokenizer: TextTokenizer
    context: int
    identity: tuple[str, ...]
    read_images: Callable[[], ImageDescription | None] = lambda: None
    step: int | None = None
    begin: Callable[[], NextLogits] | None = None
    """Returns a function of a growing sequence that keeps keys and values, for a model that is not ours."""
    open_pictures: Callable[[], PictureModel | str] = lambda: NO_ENCODER
    """Opens the processor of a model that is not ours, or returns why it cannot be shown pictures."""
    shares: Shares = field(default_factory=Shares)
    placed: ParallelModel | None = None
    scores: Callable[[Tensor, Tensor, Images | None], Tensor] | None = None

    @cached_property
    def images(self) -> ImageDescription | None:
        return self.read_images()

    @cached_property
    def pictures(self) -> PictureModel | str:
        return self.open_pictures()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights, the tokenizer and the number formats."""
        weights = xxhash.xxh3_128()
        world = self.shares.world if self.placed is not None else None
        if world is None or self.placed is None:
            state = iter(sorted(self.network.state_dict().items()))
        else:
            state = whole_state(self.placed.model, self.placed.specs, world)
        for name, tensor in state:
            content = tensor.detach().cpu().contiguous().reshape(-1)
            weights.update(f"{name} {content.dtype} {tuple(tensor.shape)}\n".encode())
            weights.update(content.view(torch.uint8).numpy().data)
        found = weights.hexdigest()
        if world is not None:
            found = world.from_main(lambda: found)
        return sha256_text(self.identity[0], found, *self.identity[1:])

    def placed_tiles(self, tokens_BT: Tensor, pixels_N3SS: Tensor, length: int | None = None) -> Images:
        """Return the images of sequences, for `logits`. Their tiles are in the order of the placeholders in the first
        `length` tokens (None: in all).
        """
        assert self.images is not None
        return place_tiles(tokens_BT, pixels_N3SS, self.images.ids.patch, self.device, length)

    def cached(self) -> CachedModel:
        """Return this model with a cache of keys and values. It must be one of ours."""
        device = self.device
        return CachedModel(lambda tokens_BT, given: self.network(tokens_BT.to(device), given), self.context, device)

    def continue_all(self, asked: Sequence[Continuation], batch_size: int) -> None:
        """Continue prompts, each until its own limit or EOS, and fill `found` of each. A model with a cache continues
        `batch_size` of them side by side. Ranks take different batches.
        """
        self._agree([one.prompt for one in asked])
        size = batch_size if isinstance(self._continuer(), CachedModel) else 1
        rounds = groupby(batches(asked, size), key=lambda batch: batch[0].pixels_N3SS is not None)
        for has_pictures, group in rounds:  # a rank without a batch of pictures runs the encoder all the same
            some = list(group)
            for batch, found in zip(some, self.shares.map(some, partial(self._continued, has_pictures)), strict=True):
                for one, tokens in zip(batch, found, strict=True):
                    one.found = tokens
        self._release()

    def _continuer(self) -> CachedModel | WindowModel:
        if (placed := self.placed) is not None:
            return placed_model(placed, self.context) or WindowModel(
                lambda tokens_BT, images: sequence_logits(placed, tokens_BT, images, only_last=True)[:, 0], self.context
            )
        if isinstance(self.network, Transformer):
            return self.cached()
        if self.begin is not None:
            next_logits = self.begin()
            return WindowModel(lambda tokens_BT, images: next_logits(tokens_BT[0].tolist())[None], self.context)
        return WindowModel(lambda tokens_BT, images: self.logits(tokens_BT)[:, -1], self.context)

    def _continued(self, has_pictures: bool, batch: Sequence[Continuation] | None) -> list[list[int]]:
        asked, images = batch or [], None
        if has_pictures:
            assert self.images is not None
            side = self.images.tiles.tile_size
            none_N3SS = torch.zeros(0, CHANNELS, side, side, dtype=torch.uint8)
            images = self.images_of([none_N3SS, *(one.pixels_N3SS for one in asked)])
        continue_batch(self._continuer(), asked, self.tokenizer.eos_id, images, self.shares.any)
        return [one.found for one in asked]

    def images_of(self, pixels: Sequence[Tensor | None]) -> ImagesOf | None:
        """Return how the tiles of some prompts are placed; None without any. Each prompt has a placeholder for every
        row of its tiles.
        """
        tiles = [one for one in pixels if one is not None]
        if not tiles:
            return None
        assert self.images is not None
        place = partial(place_tiles, placeholder=self.images.ids.patch, device=self.device)
        return partial(place, pixels_N3SS=torch.cat(tiles))

    @torch.no_grad()
    def losses(self, windows: Sequence[TokenWindow], batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Return, for each window, the losses of its counted labels in nats, float32 [counted] on the CPU, and whether
        each of these labels is the most probable token.

        Windows are sorted by length and run `batch_size` at a time. They are padded at their ends, which earlier tokens
        do not attend to. Ranks take different batches.
        """
        self._agree([window.ids for window in windows])
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))  # longest first: needs the most memory
        some = [[windows[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
        found = [one for batch in self.shares.map(some, self._batch_losses) for one in batch]
        self._release()
        results: list[Any] = [None] * len(windows)
        for index, (losses_T, is_likeliest_T) in zip(order, found, strict=True):
            results[index] = torch.from_numpy(losses_T), torch.from_numpy(is_likeliest_T)
        return results

    def _batch_losses(self, chosen: Sequence[TokenWindow] | None) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        if chosen is None:
            self._scores(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORED), None)
            return []
        tokens_BT = torch.zeros(len(chosen), len(chosen[0].ids) - 1, dtype=torch.int64)
        labels_BT = torch.full_like(tokens_BT, IGNORED)
        counted = [slice(len(window.ids) - 1 - window.counted, len(window.ids) - 1) for window in chosen]
        for row, (window, here) in enumerate(zip(chosen, counted, strict=True)):
            tokens_BT[row, : here.stop] = torch.tensor(window.ids[:-1])
            labels_BT[row, here] = torch.tensor(window.ids[-window.counted :])
        images, pixels = None, [window.pixels_N3SS for window in chosen if window.pixels_N3SS is not None]
        if pixels:
            images = self.placed_tiles(tokens_BT, torch.cat(pixels))
        scores_BT2 = self._scores(tokens_BT, labels_BT, images).cpu()
        found = []
        for row, here in enumerate(counted):
            losses_T, words_T = scores_BT2[row, here].float().unbind(1)
            found.append((losses_T.numpy(), (words_T.long() == labels_BT[row, here]).numpy()))
        return found

    def _scores(self, tokens_BT: Tensor, labels_BT: Tensor, images: Images | None) -> Tensor:
        if self.scores is not None:
            return self.scores(tokens_BT, labels_BT, images)
        logits_BTV = self.logits(tokens_BT) if images is None else self.logits(tokens_BT, images)
        scores_BT2 = torch.zeros(*tokens_BT.shape, 2)
        for row, labels_T in enumerate(labels_BT):
            here_T = labels_T >= 0
            wide_TV = logits_BTV[row][here_T.to(logits_BTV.device)].float()
            losses_T = token_losses(wide_TV, labels_T[here_T].to(wide_TV.device))
            scores_BT2[row, here_T] = torch.stack([losses_T, wide_TV.argmax(1).float()], 1).cpu()
        return scores_BT2

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _agree(self, ids: Sequence[Sequence[int]]) -> None:
        """Raise `ConfigError` on all ranks if they are asked different things."""
        self.shares.agree("questions", lambda: sha256_text(*(repr(list(one)) for one in ids)))

    def _release(self) -> None:
        if self.placed is not None:
            release(self.placed.stacks)


def from_run(
    directory: Path, world: World, backend: Backend | None = None, models: Models | None = None
) -> ScoringModel:
    """Open the newest intact checkpoint of a run, with the tokenizer of its corpus. The model computes as in training.

    `models`: as in `get_corpus`. In a process group all ranks call this together, and the model is sharded as in
    training; with a `world` of one process each rank has the whole model.
    """
    restored = restore(directory, world, backend, models)
    tokenizer, precision = restored.tokenizer, json.dumps(restored.config.precision, default=str)
    identity = ("run", tokenizer.fingerprint, precision)
    placed, context = restored.placed, restored.phase.seq_len
    opened = _ours(placed.model, world.device, tokenizer, context, identity, partial(run_images, directory))
    return over_ranks(replace(opened, step=restored.step), placed, world)


def over_ranks(model: ScoringModel, placed: ParallelModel, world: World) -> ScoringModel:
    """Return the model with its network sharded over the ranks of `world`, which divide what it is asked. `placed`:
    this rank's part of the network.
    """
    if world.size == 1:
        return model
    shares = Shares(world, placed.meshes.dp.size, placed.meshes.dp.rank, in_step=True)
    logits, scores = partial(sequence_logits, placed), partial(sequence_scores, placed)
    return replace(model, logits=logits, scores=scores, shares=shares, placed=placed)


@dataclass(frozen=True)
class StoredModel:
    """A model that is not a run, before its weights are read. `context`: the longest sequence that it was made for."""

    source: TensorSource
    tokenizer: JsonTokenizer
    context: int


def open_stored(path: Path) -> StoredModel:
    """Open an imported model, or one in the Hugging Face format, with its tokenizer."""
    source = open_model(path)
    if isinstance(source, HuggingFaceCheckpoint):
        folder, settings = path, source.raw_config.get("text_config") or source.raw_config
    else:
        folder, settings = path / TOKENIZER, load_origin(path)[1]
    tokenizer = _tokenizer(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        has = source.config.vocab_size
        raise CheckpointError(f"{folder} has a tokenizer of {tokenizer.vocab_size} ids, the model only {has}")
    context = settings.get("max_position_embeddings") or DEFAULT_CONTEXT
    if not isinstance(context, int) or context < 1:
        raise CheckpointError(f"{path}: max_position_embeddings is {context!r}, but must be a positive number")
    return StoredModel(source, tokenizer, context)


def from_directory(path: Path, device: torch.device) -> ScoringModel:
    """Open an imported model, or one in the Hugging Face format, in float32."""
    stored = open_stored(path)
    identity = ("directory", stored.tokenizer.fingerprint)
    model = materialise(stored.source).to(device)
    folder = path if isinstance(stored.source, HuggingFaceCheckpoint) else path / TOKENIZER
    read_images = partial(exported_images, folder, stored.source.config, stored.tokenizer.special_id)
    return _ours(model, device, stored.tokenizer, stored.context, identity, read_images)


def from_transformers(name: str, device: torch.device, kind: str = "AutoModelForCausalLM") -> ScoringModel:
    """Open a causal language model by its directory or its name on the hub: float32 on a CPU, bfloat16 on a GPU.

    `kind`: the class of transformers that opens it. Only safetensors are read, and no code that comes with a model is
    run.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("", name, "is not a run; other models need transformers: pip install 'transformers>=5.20'")
    import transformers

    is_local = Path(name).is_dir()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        library: Any = transformers.AutoTokenizer.from_pretrained(
            name, split_special_tokens=True, trust_remote_code=False, local_files_only=is_local
        )
        model: Any = getattr(transformers, kind).from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=is_local
        )
    except Exception as error:  # OSError, ValueError, ImportError and the hub's own types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError("", name, f"is not a run, and transformers cannot open it: {reason}") from error
    model = model.to(device).eval()
    tokenizer = _TransformersTokenizer(name, library)
    size = model.get_input_embeddings().weight.shape[0]
    if len(library) > size:
        raise ConfigError("", name, f"its tokenizer has {len(library)} ids, the model only {size}")

    def logits(tokens_BT: Tensor) -> Tensor:
        return model(input_ids=tokens_BT.to(device), use_cache=False).logits

    identity = ("transformers", tokenizer.fingerprint, str(tokenizer.bos_id), str(dtype))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    begin = partial(_cached_logits, model, device)
    return ScoringModel(model, logits, tokenizer, context, identity, begin=begin)


def _cached_logits(model: Any, device: torch.device) -> NextLogits:
    """Return a function of a growing sequence that runs a transformers model on its new tokens only. A model that
    returns no cache, and a window that moves, are run on all tokens.
    """
    cache, seen = None, list[int]()

    @torch.inference_mode()
    def logits(tokens: list[int]) -> Tensor:
        nonlocal cache, seen
        if cache is None or tokens[: len(seen)] != seen or len(tokens) == len(seen):
            cache, seen = None, []
        kept: dict[str, Any] = {} if cache is None else {"past_key_values": cache}  # some models take no such argument
        found = model(input_ids=torch.tensor([tokens[len(seen) :]], device=device), use_cache=True, **kept)
        cache, seen = getattr(found, "past_key_values", None), list(tokens)
        return found.logits[0, -1]

    return logits


class _TransformersTokenizer:
    """A transformers tokenizer. Text that looks like a special token is encoded as text. EOS replaces a missing BOS."""

    def __init__(self, name: str, library: Any) -> None:
        self.library, self.eos_id = library, library.eos_token_id
        self.bos_id = self.eos_id if library.bos_token_id is None else library.bos_token_id
        if self.bos_id is None:
            raise ConfigError("", name, "its tokenizer has neither BOS nor EOS to begin a text with")
        backend = getattr(library, "backend_tokenizer", None)
        self.fingerprint = backend.to_str() if backend is not None else json.dumps(library.get_vocab(), sort_keys=True)

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        # `verbose` would warn about long texts, but these are split into windows
        return self.library(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode(list(ids), skip_special_tokens=True)


def _ours(
    model: nn.Module,
    device: torch.device,
    tokenizer: TextTokenizer,
    context: int,
    identity: tuple[str, ...],
    read_images: Callable[[], ImageDescription | None],
) -> ScoringModel:
    def logits(tokens_BT: Tensor, images: Images | None = None) -> Tensor:
        return model(tokens_BT.to(device), _context(tokens_BT, images, device))

    def scores(tokens_BT: Tensor, labels_BT: Tensor, images: Images | None) -> Tensor:
        given = _context(tokens_BT, images, device)
        given.labels_BT, given.likeliest = labels_BT.to(device), True
        return model(tokens_BT.to(device), given)

    return ScoringModel(model.eval(), logits, tokenizer, context, identity, read_images, scores=scores)


def _context(tokens_BT: Tensor, images: Images | None, device: torch.device) -> ForwardContext:
    given = ForwardContext(torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape), device)
    given.images = images
    return given


_TOKEN = (str, None, {"content": str})


def _tokenizer(folder: Path) -> JsonTokenizer:
    """Open the tokenizer in `tokenizer.json`, with the special tokens that `tokenizer_config.json` names."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder} has no tokenizer.json: texts cannot be turned into tokens")
    path = folder / "tokenizer_config.json"
    try:
        settings = read_json(path, {"bos_token?": _TOKEN, "eos_token?": _TOKEN})
        names = [settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = (name["content"] if isinstance(name, dict) else name for name in names)
    except (OSError, UnreadableFileError) as error:
        raise CheckpointError(f"{path} does not say which tokens begin and end a text ({error})") from error
    if not isinstance(eos, str):
        raise CheckpointError(f"{path} names no eos_token: the end of a text is unknown")
    return JsonTokenizer(folder / "tokenizer.json", bos or eos, eos)
