"""Compare losses of a run's model and a transformers model with plain arithmetic, for short texts and in windows."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.factory import make_scorer
from data.filter.score.losses import LossScorer
from data.filter.score.scorer import TokenLosses
from launch.cli import main
from model.attention.plan import ForwardContext
from parallel.comm.world import World
from tests.support import hf_models
from tests.support.tiny import TINY
from train.checkpoint.restore import restore
from train.eval.contamination import MODELS
from train.eval.scoring_model import from_transformers
from train.eval.text_loss import open_losses, windows

ALONE = World(0, 1, torch.device("cpu"))
TEXTS = [("", "the model reads"), ("def line", " return a line"), ("", ""), ("while", ""), ("", "x"), ("a b", "öü\n")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_corpus) -> Path:
    root = tmp_path_factory.mktemp("token_losses")
    line = ["train", *TINY, *small_corpus, f"run.root={root}", "run.name=run", "training.steps=4", "optimizer.lr=0.01"]
    assert main(line) == 0
    return root / "run"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Save random weights and a byte-level tokenizer of few merges, in the format of the Hugging Face hub."""
    folder = tmp_path_factory.mktemp("llama")
    hf_models.byte_tokenizer(folder)
    return hf_models.save(hf_models.make("llama", vocab_size=300, bos_token_id=0, eos_token_id=1), folder)


def opened(name: Path | str, **more: int) -> tuple[TokenLosses, str]:
    return open_losses(str(name), config(name, **more))


def config(name: Path | str, **more: int) -> ScorerConfig:
    return ScorerConfig(ScorerKind.loss, model=str(name), **{"batch_size": 3, "seq_len": 1024, **more})


@torch.no_grad()
def test_losses_are_those_of_the_models_logits(llama, trained):
    """Compare losses of the second text with the logits of one row without padding, for both kinds of model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, library = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    restored = restore(trained, ALONE)
    ours, tokenizer = restored.placed.model.eval(), restored.corpus.tokenizer
    tokenise = {
        llama: lambda text: library(text, add_special_tokens=False)["input_ids"],
        trained: lambda text: tokenizer.encode([text])[0],
    }
    logits = {
        llama: lambda ids_BT: theirs(input_ids=ids_BT).logits,
        trained: lambda ids_BT: ours(ids_BT, ForwardContext(torch.arange(ids_BT.shape[1])[None])),
    }
    for name, bos in ((llama, 0), (trained, tokenizer.bos_id)):
        losses, _ = opened(name)
        found = losses(TEXTS)
        for texts, mine in zip(TEXTS, found, strict=True):
            before, wanted = map(tokenise[name], texts)
            assert len(mine) == len(wanted) and mine.dtype == np.float32
            if wanted:
                row = torch.tensor([bos, *before, *wanted])
                plain = cross_entropy(logits[name](row[None, :-1])[0].float(), row[1:], reduction="none")
                assert mine == pytest.approx(plain[-len(wanted) :].numpy(), abs=1e-4)
        shifted = losses([("b", text[1]) for text in TEXTS])
        assert abs(shifted[1] - found[1]).max() > 1e-3, "the first text is context"


@pytest.mark.parametrize("context", [16, 17, 64])
@torch.no_grad()
def test_windows_see_half_a_context_before(llama, context):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    scoring = from_transformers(str(llama), torch.device("cpu"))
    text = "".join(chr(97 + i * i % 26) for i in range(150))
    ids = [0, *scoring.tokenizer.encode([text])[0]]
    losses, _ = opened(llama, seq_len=context)
    mine, last = losses([("", text)])[0], 0
    assert len(mine) == len(ids) - 1 > 2 * context
    for place in range(1, len(ids)):
        end = place if place <= context else context + (place - context - 1) // (context // 2) * (context // 2)
        if place > context:  # a window counts labels from end + 1 to half a context later, or to the text's end
            last = min(end + context // 2, len(ids) - 1)
            row = ids[last - context : place]
            assert len(row) > context // 2
        else:
            row = ids[:place]
        plain = cross_entropy(model(input_ids=torch.tensor([row])).logits[0, -1], torch.tensor(ids[place]))
        assert mine[place - 1] == pytest.approx(float(plain), abs=1e-4)
    assert last == len(ids) - 1


@pytest.mark.parametrize("context", [1, 2, 3, 8, 100])
@pytest.mark.parametrize(("length", "wanted"), [(1, 0), (2, 1), (9, 8), (10, 9), (40, 39), (40, 5), (40, 1), (40, 0)])
def test_each_wanted_label_is_counted_once(context, length, wanted):
    ids = list(range(length))
    found = windows(7, ids, wanted, context)
    labels = [label for window in found for label in window.ids[-window.counted :]]
    assert labels == ids[length - wanted :]
    assert all(1 <= window.counted < len(window.ids) <= context + 1 and window.text == 7 for window in found)
    # the positions of windows do not depend on the number of wanted labels
    rows = [window.ids for window in windows(7, ids, length - 1, context)]
    assert [window.ids for window in found] == rows[len(rows) - len(found) :]


def test_batches_and_company_change_nothing_that_matters(llama, trained):
    pairs = [("a" * (i % 5), "the model " * (1 + i % 7)) for i in range(12)]
    for name in (llama, trained):
        one, _ = opened(name, batch_size=1)
        many, _ = opened(name, batch_size=5)
        for alone, together in zip(one(pairs), many(pairs[::-1])[::-1], strict=True):
            assert alone == pytest.approx(together, abs=1e-4)
        assert many(pairs)[0].tolist() == many(pairs)[0].tolist()
        assert len(one([("", "</s>")])[0]) > 1, "special tokens in a text are ordinary text"
    assert opened(llama)[0]([]) == []


def test_the_fingerprint_is_of_weights_tokenizer_and_context(llama, trained, tmp_path):
    from transformers import AutoModelForCausalLM

    _, first = opened(llama)
    shutil.copytree(llama, copy := tmp_path / "elsewhere")
    assert opened(copy, batch_size=1)[1] == first, "neither the path nor the batch size counts"
    assert opened(llama, seq_len=8)[1] != first
    assert opened(llama, seq_len=64)[1] == first, "the model's context is 64"
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    model.save_pretrained(copy)
    changed = opened(copy)[1]
    tokenizer = copy / "tokenizer.json"
    shutil.copyfile(llama / "model.safetensors", copy / "model.safetensors")
    tokenizer.write_text(tokenizer.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
    retokenised = opened(copy)[1]
    run = opened(trained)[1]
    assert len({first, changed, retokenised, run}) == 4
    assert opened(trained)[1] == run


def losses_of(name: str) -> tuple[list[list[float]], str]:
    losses, fingerprint = opened(name)
    return [one.tolist() for one in losses(TEXTS)], fingerprint


def test_ranks_open_the_whole_model_each(ranks, trained):
    alone = losses_of(str(trained))
    assert ranks(2, losses_of, str(trained)) == [alone, alone]


def test_a_scorer_is_made_of_it(trained):
    scorer = make_scorer(config(trained), MODELS, Path("unused"))
    assert isinstance(scorer, LossScorer)
    plain, noise = scorer.score(
        [Record("a", "d", "s", "the model reads a line and writes"), Record("b", "d", "s", "xq}{zj~#^kv|`")]
    )
    assert plain < noise, "four steps are enough to tell words from noise"


def test_what_cannot_be_opened_says_so(tmp_path, trained, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="is not a run, and transformers cannot open it") as caught:
            opened(name)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "empty" / "model.yaml").write_text("")
    with pytest.raises(ConfigError, match="is an imported model"):
        open_losses(str(tmp_path / "empty"), config("x"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'transformers"):
        open_losses(str(tmp_path / "missing"), config("x"))
    opened(trained)
