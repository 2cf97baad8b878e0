"""Token losses of a model that exists, for the filter's scorers: a run of ours, or what transformers can open.

How a text becomes a loss per token. First and second text are turned into tokens apart, so that the second's tokens are
the same whatever comes before; BOS comes first, as in packed documents (EOS where the tokenizer has no BOS). What is
longer than `context` goes in windows of `context` tokens: the first counts all of them, each later one its last half
(the last window what is left), which sees the half before. Later windows begin inside the text, at position 0 and
without BOS, as rows of packed documents do.

Windows are sorted by length and run `batch` at a time, padded at their ends, where no earlier token looks. Which texts
share a batch changes a loss in its last bits (by more where FP8 scales span the batch): scores are cached for that.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core.errors import ConfigError
from core.files import sha256_text
from data.filter.config import ScorerConfig
from data.filter.score.scorer import TokenLosses
from model.attention.plan import ForwardContext
from parallel.comm.world import World
from parallel.sharding import local
from train.checkpoint.reader import IMPORTED
from train.checkpoint.restore import restore

Logits = Callable[[Tensor], Tensor]
"""Logits [B, T, V] of token ids [B, T] (int64, on the host) of rows that begin at position 0."""


@dataclass(frozen=True)
class ScoringModel:
    """A model ready to be asked. `encode`: token ids of texts, without BOS and EOS. `context`: how many tokens it was
    made for. `fingerprint`: a hash of weights, tokenizer and how the products are computed.
    """

    logits: Logits
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    bos_id: int
    context: int
    fingerprint: str


@dataclass(frozen=True)
class TokenWindow:
    """Inputs `ids[:-1]` and labels `ids[1:]`; the losses of the last `counted` belong to text number `text`."""

    text: int
    ids: list[int]
    counted: int


def open_losses(name: str, config: ScorerConfig, device: torch.device | None = None) -> tuple[TokenLosses, str]:
    """Token losses of the model that `name` says, and their fingerprint: the directory of a run of ours, or a folder or
    name that transformers opens. On this process alone; `device` None: a GPU where there is one. The context is
    `config.context`, or what the model was made for where that is less.

    Raises `ConfigError` (its key is empty, for the caller to fill in) where there is no such model or no transformers.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    folder = Path(name).expanduser()
    if (folder / "config.yaml").exists():
        speaker = from_run(folder, device)
    elif (folder / IMPORTED).exists():
        raise ConfigError("", name, "is an imported model: name the Hugging Face folder that it was made from")
    else:
        speaker = from_transformers(name, device)
    context = min(config.seq_len, speaker.context)
    return token_losses(speaker, context, config.batch_size), sha256_text(speaker.fingerprint, str(context))


def from_run(directory: Path, device: torch.device) -> ScoringModel:
    """The newest whole checkpoint of a run, computed as in training; its corpus must still be there, for its
    tokenizer. Where there is a process group all ranks call this together, and each has the whole model.
    """
    restored = restore(directory, World(0, 1, device))
    model, tokenizer = restored.placed.model.eval(), restored.corpus.tokenizer

    def logits(tokens_BT: Tensor) -> Tensor:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
        return model(tokens_BT.to(device), ForwardContext(positions_BT, device))

    precision = json.dumps(restored.config.precision, default=str)
    fingerprint = sha256_text("run", weights_hash(model), tokenizer.fingerprint, precision)
    return ScoringModel(logits, tokenizer.encode, tokenizer.bos_id, restored.phase.seq_len, fingerprint)


def from_transformers(name: str, device: torch.device) -> ScoringModel:
    """A causal language model by folder or by name on the hub: float32 on a CPU, bfloat16 on a GPU."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("", name, "is no run of ours, and others need transformers: pip install 'transformers>=5.20'")
    import transformers

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, split_special_tokens=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # it raises OSError, ValueError, ImportError and the hub's own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError("", name, f"is no run of ours, and transformers cannot open it: {reason}") from error
    model = model.to(device).eval()
    bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos_id is None:
        raise ConfigError("", name, "its tokenizer has neither BOS nor EOS to begin a text with")
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise ConfigError("", name, f"its tokenizer has {len(tokenizer)} ids, the model only {size}")

    def logits(tokens_BT: Tensor) -> Tensor:
        return model(input_ids=tokens_BT.to(device), use_cache=False).logits

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        # text that looks like a special token is ordinary text; `verbose` would warn of texts that we cut ourselves
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    fingerprint = sha256_text("transformers", weights_hash(model), rules, str(bos_id), str(dtype))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return ScoringModel(logits, encode, bos_id, context, fingerprint)


def token_losses(speaker: ScoringModel, context: int, batch: int) -> TokenLosses:
    """The speaker as scorers see it, in windows of `context` tokens, `batch` at a time."""

    def losses(pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.float32]]:
        first = speaker.encode([pair[0] for pair in pairs])
        second = speaker.encode([pair[1] for pair in pairs])
        found = []
        for text, (before, wanted) in enumerate(zip(first, second, strict=True)):
            found += windows(text, [speaker.bos_id, *before, *wanted], len(wanted), context)
        parts = _run(speaker.logits, found, batch)
        results: list[list[NDArray[np.float32]]] = [[] for _ in pairs]
        for window, part in zip(found, parts, strict=True):
            results[window.text].append(part)
        return [np.concatenate(one) if one else np.zeros(0, np.float32) for one in results]

    return losses


def windows(text: int, ids: list[int], wanted: int, context: int) -> list[TokenWindow]:
    """What has to be run for the losses of the last `wanted` of `ids`, in their order; windows without any are left
    out. Where windows end depends on the first `ids` alone.
    """
    found, end, first = [], 0, len(ids) - wanted
    while end < len(ids) - 1:
        begin = end  # the last label of the window before
        end = min(begin + (max(1, context // 2) if begin else context), len(ids) - 1)
        counted = min(end - begin, end - first + 1)
        if counted > 0:
            found.append(TokenWindow(text, ids[max(0, end - context) : end + 1], counted))
    return found


@torch.no_grad()
def _run(logits: Logits, found: list[TokenWindow], batch: int) -> list[NDArray[np.float32]]:
    """Losses in nats of the counted labels of each window."""
    results: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(found)
    order = sorted(range(len(found)), key=lambda place: -len(found[place].ids))  # the largest first: memory shows early
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        length = len(found[chosen[0]].ids) - 1
        tokens_BT = torch.zeros(len(chosen), length, dtype=torch.int64)
        for row, place in enumerate(chosen):
            tokens_BT[row, : len(found[place].ids) - 1] = torch.tensor(found[place].ids[:-1])
        logits_BTV = logits(tokens_BT)
        for row, place in enumerate(chosen):
            last, counted = len(found[place].ids) - 1, found[place].counted
            labels_T = torch.tensor(found[place].ids[-counted:], device=logits_BTV.device)
            losses_T = cross_entropy(logits_BTV[row, last - counted : last].float(), labels_T, reduction="none")
            results[place] = losses_T.cpu().numpy()
    return results


def weights_hash(model: nn.Module) -> str:
    """Of all tensors of the model by name and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        content = local(tensor).detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {content.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()
