"""Evaluate a model on tasks of EleutherAI's harness without exporting it: `leviathan evaluate RUN tasks=[...]`.

The harness asks for log-likelihoods and for continuations, of texts and of questions about pictures. Texts begin with
BOS, as packed documents do in training. A text longer than the model's context is cut at its beginning, as the harness
does for its own models; with pictures it is an error.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from core.errors import CheckpointError, ConfigError, first_line
from core.files import check_target, local_path, write_text
from parallel.comm.world import World
from precision.config import Backend
from train.eval.config import GenerateConfig
from train.eval.generate import Continuation, before_stops, until
from train.eval.multimodal import TokenizedQuestion, question
from train.eval.open_model import open_scoring_model
from train.eval.scoring_model import ScoringModel, TokenWindow
from train.overlap.samples import search_samples
from train.overlap.search import check_files

T = TypeVar("T")


class HarnessModel(TemplateLM):
    """The harness's interface to a `ScoringModel`. Requests of tasks with pictures end with `{"visual": pictures}`."""

    MULTIMODAL = True

    def __init__(self, model: ScoringModel, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = list(self.model.tokenizer.encode([string])[0])
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and whether greedy decoding produces it."""
        texts = [request for request in requests if len(request.args) == 2]
        of_texts = iter(super().loglikelihood(texts, disable_tqdm) if texts else [])
        of_pictures = iter(self._about_pictures([request.args for request in requests if len(request.args) > 2]))
        return [next(of_texts if len(request.args) == 2 else of_pictures) for request in requests]

    def _about_pictures(self, requests: Sequence[tuple[str, str, dict[str, Any]]]) -> list[tuple[float, bool]]:
        windows = []
        for place, (context, continuation, media) in enumerate(requests):
            asked = self._question(context, media.get("visual"))
            before, after = [], list(self.model.tokenizer.encode([continuation])[0])
            if asked.last:
                (_, *before), after = self._encode_pair(asked.last, continuation)  # without BOS
            ids = [self.prefix_token_id, *asked.ids, *before, *after]
            self._check_length(len(ids) - 1, 0)
            windows.append(TokenWindow(place, ids, len(after), asked.pixels_N3SS))
        return self._log_probabilities(windows, len(requests))

    def _question(self, text: str, visuals: Any) -> TokenizedQuestion:
        return question(text, visuals, self.model.images, lambda part: self.model.tokenizer.encode([part])[0])

    def _check_length(self, tokens: int, more: int) -> None:
        """Raise `ConfigError` if a question with pictures does not fit the context: it cannot be cut."""
        if tokens + more > self.model.context:
            reason = f"a question with pictures takes {tokens} tokens, but the model's context is {self.model.context}"
            raise ConfigError("tasks", None, reason)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and whether greedy decoding produces it."""
        windows = []
        for place, (_, before, continuation) in enumerate(requests):
            ids = (before + continuation)[-(self.model.context + 1) :]
            windows.append(TokenWindow(place, ids, min(len(continuation), len(ids) - 1)))
        return self._log_probabilities(windows, len(requests))

    def _log_probabilities(self, windows: list[TokenWindow], count: int) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * count
        windows = [window for window in windows if window.counted]
        found = self.model.losses(windows, self.batch_size)
        for window, (losses_T, is_likeliest_T) in zip(windows, found, strict=True):
            results[window.text] = -float(losses_T.sum()), bool(is_likeliest_T.all())
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, split into windows that do not overlap."""
        results = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.context,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            results.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the continuations, each cut before its first stop string. Runs `batch_size` requests at a time, in the
        order of their lengths.
        """
        asked = [self._continuation(*request.args) for request in requests]
        self.model.continue_all(asked, self.batch_size)
        texts = [self.model.tokenizer.decode(one.found) for one in asked]
        return [before_stops(text, _stops(request.args[1])) for text, request in zip(texts, requests, strict=True)]

    def _continuation(self, prompt: str, options: dict[str, Any], media: dict[str, Any] | None = None) -> Continuation:
        config = _generation(options)
        limit = config.tokens
        asked = None if media is None else self._question(prompt, media.get("visual"))
        pixels = None if asked is None else asked.pixels_N3SS
        if asked is None or pixels is None:
            ids = self.tok_encode(prompt)[-max(1, self.model.context - limit) :]
        else:
            ids = [self.prefix_token_id, *asked.ids, *self.model.tokenizer.encode([asked.last])[0]]
            self._check_length(len(ids), 1)
            config = replace(config, tokens=min(limit, self.model.context - len(ids)))
        return Continuation(ids, config, until(_stops(options), self.model.tokenizer.decode), pixels)


_WITHOUT_EFFECT: dict[str, tuple[float, ...]] = {
    **{"num_beams": (1,), "num_return_sequences": (1,), "repetition_penalty": (1,), "no_repeat_ngram_size": (0,)},
    **{"min_length": (0,), "min_new_tokens": (0,), "length_penalty": (0, 1), "use_cache": (0, 1)},
}
_WITHOUT_EFFECT_ON_SAMPLES: dict[str, tuple[float, ...]] = {"top_p": (1,), "min_p": (0,), "typical_p": (1,)}
"""Values of options that change nothing. Greedy decoding ignores the latter options, as in transformers."""


def _generation(options: dict[str, Any]) -> GenerateConfig:
    """Return how a task wants its continuations made, by the rules of the harness's own `hf` models. Only `top_k` has
    no default of 50. Raises `ConfigError` for an option that we would have to ignore.
    """
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(options))
    limit, samples, temperature, top_k = (
        wanted.pop(key, None) for key in ("max_gen_toks", "do_sample", "temperature", "top_k")
    )
    if samples and not temperature:
        raise ConfigError("tasks", None, "do_sample=true needs a temperature above 0 in the task's generation_kwargs")
    for key, value in wanted.items():
        harmless = _WITHOUT_EFFECT.get(key, _WITHOUT_EFFECT_ON_SAMPLES.get(key, ()))
        is_ignored = key == "until" or (key in _WITHOUT_EFFECT_ON_SAMPLES and not samples)
        if not is_ignored and value is not None and value not in harmless:
            reason = f"{key}={value} in a task's generation_kwargs is not supported; remove it from a copy of the task"
            raise ConfigError("tasks", None, reason)
    if not samples:
        return GenerateConfig(run="", tokens=limit, temperature=0.0, top_k=None)
    return GenerateConfig(run="", tokens=limit, temperature=float(temperature), top_k=int(top_k) if top_k else None)


def _stops(options: dict[str, Any]) -> list[str]:
    """Return the strings before which a continuation ends."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _reported(tasks: Sequence[str], function: Callable[[], T]) -> T:
    """Return what `function` returns. Report what the harness raises about a task as one of our errors."""
    import datasets

    try:
        return function()
    except (OSError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise CheckpointError(f"a task's data cannot be read: {first_line(error)}") from error
    except (ValueError, KeyError) as error:  # such as a template or doc_to_image that names no column of the data
        raise ConfigError("tasks", ",".join(tasks), f"a task cannot be asked: {first_line(error)}") from error


def run_tasks(
    run: Path,
    tasks: Sequence[str],
    world: World,
    *,
    backend: Backend | None = None,
    batch_size: int = 8,
    task_path: str | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    out: str | None = None,
    corpus: str | None = None,
    search_tokens: int = 0,
) -> int:
    """Evaluate tasks, print a table, and write results and samples to `out` as JSON. `corpus` and `search_tokens`: as
    in `train.overlap.search.search_for_model`.

    Each rank computes the metrics, from answers that the ranks have divided among them; rank 0 prints and writes.
    """
    import datasets
    import huggingface_hub
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager, get_task_dict

    if out is not None:
        check_target("out", out, ".json")
    if corpus is not None and search_tokens:
        world.from_main(lambda: check_files(corpus))
    huggingface_hub.logging.set_verbosity_error()  # it logs each of its retries
    datasets.disable_progress_bars()
    own = None if task_path is None else str(Path(task_path).expanduser())
    if own is not None and not Path(own).is_dir():
        raise ConfigError("task_path", task_path, "no such directory")
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # listing the harness's thousands of tasks takes seconds
        manager = TaskManager(include_path=own)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            raise ConfigError("tasks", task, "no such task; task_path names a directory of your own tasks", near)
    model = HarnessModel(open_scoring_model(run, world, backend), batch_size)
    if world.size > 1:  # the others then find the data in the cache
        world.from_main(lambda: _reported(tasks, lambda: bool(get_task_dict(list(tasks), manager))))
    found: Any = _reported(
        tasks,
        lambda: simple_evaluate(
            model, tasks=list(tasks), num_fewshot=few_shot, limit=limit, task_manager=manager, bootstrap_iters=0
        ),
    )
    if not world.is_main:
        return 0
    beside = search_samples(found.get("samples", {}), run, corpus, search_tokens)
    print(utils.make_table(found))
    print(json.dumps({"contamination": beside}, indent=2))
    if out is not None:
        figures = {"results": found["results"], "samples": found.get("samples", {}), "contamination": beside}
        write_text(local_path("out", out), json.dumps(figures, indent=2, default=str) + "\n")
    return 0
