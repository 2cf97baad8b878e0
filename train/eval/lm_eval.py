"""Tasks of EleutherAI's evaluation harness on our own model, without an export: `leviathan evaluate RUN tasks=[...]`.

The harness asks for log-likelihoods and for continuations; what is here answers both. Texts begin with BOS, as packed
documents do in training; what is longer than the model's context loses its beginning, as in the harness's own models.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from core.errors import CheckpointError, ConfigError
from data.tokenizer import JsonTokenizer, Tokenizer
from model.attention.plan import ForwardContext
from model.huggingface import HuggingFaceCheckpoint
from model.tensor_source import materialise
from model.transformer import Transformer
from parallel.comm.world import World
from precision.config import Backend
from train.checkpoint.init_from import open_model
from train.checkpoint.reader import load_origin
from train.checkpoint.restore import restore
from train.eval.generate import GenerateConfig, continue_tokens, model_logits
from train.eval.held_out import EvaluateConfig

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class TaskModel:
    """A model ready to be asked, with what turns text into its tokens."""

    model: Transformer
    tokenizer: Tokenizer
    context: int


class HarnessModel(TemplateLM):
    """The harness's view of a `Subject`."""

    def __init__(self, subject: TaskModel, batch: int) -> None:
        super().__init__()
        self.subject, self.batch = subject, batch
        self.subject.model.eval()

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.subject.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.subject.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = list(self.subject.tokenizer.encode([string])[0])
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: its log-probability, and whether greedy decoding gives it."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            rows = [(requests[i][1] + requests[i][2])[-(self.subject.context + 1) :] for i in chosen]
            logp_BTV = self._log_probabilities([row[:-1] for row in rows])
            for place, (index, row) in enumerate(zip(chosen, rows, strict=True)):
                wanted = torch.tensor(requests[index][2][-(len(row) - 1) :])
                logp_TV = logp_BTV[place, len(row) - 1 - len(wanted) : len(row) - 1]
                total = float(logp_TV.gather(1, wanted[:, None]).sum())
                results[index] = total, bool((logp_TV.argmax(1) == wanted).all())
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, cut into windows that do not overlap."""
        results = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.subject.context,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            results.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop strings, which are left out."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(options.get("max_gen_toks", 256))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
        config = GenerateConfig(run="", tokens=limit, temperature=temperature, top_k=None)
        room = max(1, self.subject.context - limit)
        ids, text = self.tok_encode(prompt)[-room:], ""
        found: list[int] = []
        ask = partial(model_logits, self.subject.model)
        for token in continue_tokens(ask, ids, self.subject.context, config, self.eot_token_id):
            found.append(token)
            text = self.subject.tokenizer.decode(found)
            cut = min((text.find(stop) for stop in stops if stop and stop in text), default=-1)
            if cut >= 0:
                return text[:cut]
        return text

    def _log_probabilities(self, rows: list[list[int]]) -> torch.Tensor:
        """float32 [B, T, V] of rows padded at their ends, where no earlier position looks."""
        length, device = max(map(len, rows)), next(self.subject.model.parameters()).device
        tokens_BT = torch.zeros(len(rows), length, dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens_BT[place, : len(row)] = torch.tensor(row)
        context = ForwardContext(torch.arange(length).expand(len(rows), length), device)
        return self.subject.model(tokens_BT.to(device), context).float().log_softmax(-1).cpu()


def run_tasks(config: EvaluateConfig, world: World) -> int:
    """Evaluate and print a table; the figures go to `out` as JSON. One process does it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if world.size > 1:
        raise ConfigError("tasks", None, "are evaluated by one process: start it without torchrun")
    own = None if config.task_path is None else str(Path(config.task_path).expanduser())
    if own is not None and not Path(own).is_dir():
        raise ConfigError("task_path", config.task_path, "no such directory")
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(config.tasks) <= set(manager.all_tasks):  # the harness's own thousands take seconds to look through
        manager = TaskManager(include_path=own)
    for task in config.tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            raise ConfigError("tasks", task, "no such task; task_path names a directory of your own", near)
    model = HarnessModel(subject(Path(config.run).expanduser(), world, config.backend), config.micro_batch_size or 8)
    try:
        found: Any = simple_evaluate(
            model,
            tasks=list(config.tasks),
            num_fewshot=config.few_shot,
            limit=config.limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError) as error:
        raise CheckpointError(f"a task's data cannot be read: {str(error).strip().splitlines()[0]}") from error
    print(utils.make_table(found))
    if config.out is not None:
        figures = {"results": found["results"], "samples": found.get("samples", {})}
        text = json.dumps(figures, indent=2, default=str)
        Path(config.out).expanduser().write_text(text + "\n")
    return 0


def subject(path: Path, world: World, backend: Backend | None = None) -> TaskModel:
    """The model in a run's directory, an imported one, or one in the Hugging Face format; these two in float32. Raises
    `ConfigError` where a `backend` is asked for that would not be used.
    """
    if (path / "config.yaml").exists():
        restored = restore(path, world, backend)
        return TaskModel(restored.placed.model, restored.corpus.tokenizer, restored.phase.seq_len)
    if backend is not None:
        reason = "is for runs: any other model is evaluated in float32, by PyTorch; leave it out"
        raise ConfigError("backend", backend, reason)
    source = open_model(path)
    if isinstance(source, HuggingFaceCheckpoint):
        folder, settings = path, source.raw_config.get("text_config") or source.raw_config
    else:
        folder, settings = path / "tokenizer", load_origin(path)[1]
    tokenizer = _tokenizer(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        has = source.config.vocab_size
        raise CheckpointError(f"{folder} has a tokenizer of {tokenizer.vocab_size} ids, the model only {has}")
    longest = int(settings.get("max_position_embeddings") or DEFAULT_CONTEXT)
    return TaskModel(materialise(source).to(world.device), tokenizer, longest)


def _tokenizer(folder: Path) -> Tokenizer:
    """What `tokenizer.json` and the names in `tokenizer_config.json` describe."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder} has no tokenizer.json: texts cannot be turned into tokens")
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text())
        names = [settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = (name["content"] if isinstance(name, dict) else name for name in names)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say which tokens begin and end a text ({error})") from error
    if not isinstance(eos, str):
        raise CheckpointError(f"{path} names no eos_token: the end of a text cannot be told")
    return JsonTokenizer(folder / "tokenizer.json", bos or eos, eos)
