"""Features of a reference model: they are the means that they should be, depend on nothing but the record, and teach the
learned scorer what no n-gram shows.
"""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from data.filter import pipeline
from data.filter.audit.separation import spearman
from data.filter.config import FeatureKind, FilterRules, InputConfig, ScorerConfig, ScorerKind, decisive_settings
from data.filter.input.records import Record
from data.filter.pipeline import Filter
from data.filter.score import linear
from data.filter.score.factory import Models, check_models, make_scorer
from data.filter.score.features import ReferenceFeatures
from data.filter.score.learned import LearnedScorer
from data.filter.select.lines import LineFilter
from data.filter.store import OneWorker
from model.attention.plan import ForwardContext
from model.config import ModelConfig
from model.transformer import Transformer
from tests.data.filter.threads import on_threads
from tests.support import hf_models
from tests.support.filtering import job, outputs, write_lines, write_outputs
from tests.support.models import SIZES, build
from train.eval import text_features
from train.eval.scoring_model import ScoringModel, from_transformers
from train.eval.text_features import open_features

WORDS = ["".join(letters) for letters in product("bcdfg", "aeiou", "klmnp", "aeiou", "rstvw")][:2046]
IDS = {word: number + 2 for number, word in enumerate(WORDS)}
KINDS = (FeatureKind.embeddings, FeatureKind.hidden)
CONTEXT = 24


class WordTokenizer:
    """One token a word."""

    bos_id, eos_id = 0, 1

    def encode(self, texts: Any) -> list[list[int]]:
        return [[IDS[word] for word in text.split()] for text in texts]


@cache
def ours(seed: int = 0) -> ScoringModel:
    """Return a model of 33,000 parameters in the memory, with an embedding for each of `WORDS`."""
    config = ModelConfig(
        **{**SIZES, "vocab_size": 2048}, dense_hidden_size=24, expert_hidden_size=8, num_experts=2, moe_every=2
    )
    network = build(config, seed).float().eval()

    def logits(tokens_BT: Any) -> Any:
        return network(tokens_BT, ForwardContext(torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)))

    return ScoringModel(network, logits, WordTokenizer(), CONTEXT, ("test",))


@cache
def opened(kind: FeatureKind, seed: int = 0, **more: int) -> tuple[Any, str]:
    config = ScorerConfig(ScorerKind.learned, reference="m", features=kind, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_features, "open_by_name", lambda name, models: ours(seed))
        return open_features("m", config)


def reference(kind: FeatureKind, seed: int = 0, **more: int) -> ReferenceFeatures:
    return ReferenceFeatures(kind, "m", *opened(kind, seed, **more))


def pairs(count: int = 7) -> list[tuple[str, str]]:
    chance = np.random.default_rng(5)
    return [(" ".join(chance.choice(WORDS, n % 4)), " ".join(chance.choice(WORDS, 3 * n % 7))) for n in range(count)]


@pytest.fixture(params=["ours", pytest.param("llama", marks=pytest.mark.slow)])
def model(request, tmp_path, monkeypatch) -> ScoringModel:
    """Return a model of ours or of transformers, which is the one that is opened."""
    found = ours()
    if request.param == "llama":
        hf_models.byte_tokenizer(tmp_path)
        hf_models.save(hf_models.make("llama", vocab_size=300, bos_token_id=0, eos_token_id=1), tmp_path)
        found = from_transformers(str(tmp_path), torch.device("cpu"))
    monkeypatch.setattr(text_features, "open_by_name", lambda name, models: found)
    return found


def vectors(network: Any, ids: torch.Tensor, layers: int) -> torch.Tensor:
    """Return what the first layers make of ids."""
    if isinstance(network, Transformer):
        x, given = network.embedding(ids), ForwardContext(torch.arange(ids.shape[1])[None])
        for layer in list(network.layers.values())[:layers]:
            x = layer(x, given)
        return x
    cut = copy.deepcopy(network.base_model)
    cut.layers, cut.norm = cut.layers[:layers], torch.nn.Identity()
    return cut(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_means_over_the_tokens_of_each_text(kind, model):
    """Hidden states are those that the first half of the layers makes of the embeddings."""
    network: Any = model.network
    layers = 0 if kind is FeatureKind.embeddings else 1 if model is ours() else 2
    texts = pairs()
    found, cut = open_features("m", ScorerConfig(ScorerKind.learned, reference="m", features=kind))[0](texts)
    assert found.dtype == np.float32 and np.isfinite(found).all() and cut == 0
    for (prompt, answer), mine in zip(texts, found, strict=True):
        before, after = (list(model.tokenizer.encode([text])[0]) for text in (prompt, answer))
        ids = torch.tensor([[model.tokenizer.bos_id, *before, *after]])
        x = vectors(network, ids, layers)[0, 1:]
        wanted = []
        for part in (x[: len(before)], x[len(before) :]):
            wanted += [part.mean(0), part.amax(0)] if len(part) else [x.new_zeros(x.shape[1])] * 2
        assert np.allclose(mine, torch.cat(wanted).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_other_records_or_threads(kind):
    read, texts = opened(kind)[0], pairs()
    together = read(texts)[0]
    assert b"".join(read([one])[0].tobytes() for one in texts) == together.tobytes()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert read(texts[::-1])[0][::-1].tobytes() == together.tobytes() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def features_here(kind: FeatureKind) -> bytes:
    return opened(kind)[0](pairs())[0].tobytes()


@pytest.mark.slow
def test_features_are_the_same_in_every_process(ranks):
    assert ranks(2, features_here, FeatureKind.hidden) == [features_here(FeatureKind.hidden)] * 2


def test_long_texts_are_cut_to_the_context():
    """Half of the context is left to the prompt if both texts are long. Embeddings have no context."""
    long = [" ".join(WORDS[n : n + 40]) for n in (0, 100)]
    read = opened(FeatureKind.hidden)[0]
    for texts, cut in (
        ((long[0], long[1]), (11, 12)),
        ((long[0], "bakar"), (22, 1)),
        (("bakar", long[1]), (1, 22)),
        (("", long[1]), (0, 23)),
        ((long[0], ""), (23, 0)),
    ):
        short = [" ".join(text.split()[:count]) for text, count in zip(texts, cut, strict=True)]
        (found, cuts), (same, none) = read([texts]), read([(short[0], short[1])])
        assert found.tobytes() == same.tobytes() and (cuts, none) == (1, 0)
    assert opened(FeatureKind.hidden, seq_len=12)[1] != opened(FeatureKind.hidden)[1]
    read, fingerprint = opened(FeatureKind.embeddings)
    assert read([(long[0], long[1])])[1] == 0 and opened(FeatureKind.embeddings, seq_len=12)[1] == fingerprint


# -- in the learned scorer


def riddles() -> list[Record]:
    """Return records that share no word. The label is the number of words whose embedding begins with a positive value,
    which no n-gram shows.
    """
    signs = ours().network.embedding.weight[2:, 0].detach().numpy() > 0
    chance = np.random.default_rng(3)
    words = {sign: iter(chance.permutation(np.array(WORDS)[signs == sign])) for sign in (False, True)}
    found = []
    for number in range(200):
        label = int(chance.integers(9))
        text = chance.permutation([next(words[place < label]) for place in range(8)])
        found.append(Record(f"{number}", "d", "s", " ".join(text), label=label))
    return found


def fitted(folder: Path, kind: FeatureKind | None, reports: list[str] | None = None) -> LearnedScorer:
    config = ScorerConfig(ScorerKind.learned, reference="m", features=kind or FeatureKind.ngrams)
    scorer = LearnedScorer(config, folder, None, None if kind is None else reference(kind))
    scorer.report = [].append if reports is None else reports.append
    scorer.fit(lambda: iter(riddles()))
    return scorer


def agreement(scorer: LearnedScorer) -> float:
    return spearman(scorer.score(riddles()), np.array([one.label for one in riddles()], np.float64))


def test_they_teach_what_no_ngram_shows(tmp_path):
    """Control: n-grams alone, and the features of a model with other embeddings."""
    reports: list[str] = []
    assert all(agreement(fitted(tmp_path / kind.name, kind, reports)) > 0.75 for kind in KINDS)
    assert reports[0].startswith("features of m (embeddings): ") and "min for 200 in one process" in reports[0]
    assert reports[1].endswith(" scorer.features=embeddings scorer.reference=m") and not any(
        "cut" in r for r in reports
    )
    assert abs(agreement(fitted(tmp_path / "ngrams", None))) < 0.25
    other = LearnedScorer(ScorerConfig(ScorerKind.learned), tmp_path / "b", None, reference(KINDS[0], seed=1))
    other.report = [].append
    other.fit(lambda: iter(riddles()))
    assert abs(agreement(other)) < 0.25


def test_a_stored_scorer_needs_the_model_that_it_learned_with(tmp_path):
    scorer, plain = fitted(tmp_path, KINDS[1]), fitted(tmp_path, None)
    assert scorer.directory != plain.directory

    def stored(directory: Path, given: ReferenceFeatures | None) -> LearnedScorer:
        config = ScorerConfig(ScorerKind.learned, model=str(directory))
        return LearnedScorer(config, tmp_path, None, given)

    again = stored(scorer.directory, reference(KINDS[1]))
    one_by_one = np.concatenate([again.score([record]) for record in riddles()])
    assert one_by_one.tobytes() == scorer.score(riddles()).tobytes()
    for directory, given, message in (
        (scorer.directory, None, r"features=ngrams: the stored scorer learned from features \(hidden\) of m"),
        (scorer.directory, reference(KINDS[0]), "features=embeddings: the stored scorer"),
        (scorer.directory, reference(KINDS[1], seed=1), "reference=m: is another model"),
        (scorer.directory, reference(KINDS[1], seq_len=12), r"reference=m: is another model, or .*scorer.seq_len"),
        (plain.directory, reference(KINDS[1]), "features=.*hidden.*: the stored scorer learned from n-grams alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            stored(directory, given)
    facts = scorer.directory / linear.FACTS
    facts.write_text(json.dumps({key: one for key, one in json.loads(facts.read_text()).items() if key != "reference"}))
    with pytest.raises(ConfigError, match=r"does not belong|learned from n-grams alone"):
        stored(scorer.directory, reference(KINDS[1]))


def test_processes_and_streams_use_them(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_RECORDS", 32)
    rows = [{"q": one.text[:20].rsplit(" ", 1)[0], "a": one.text, "level": one.label} for one in riddles()]
    source = write_lines(tmp_path / "in.jsonl", rows)
    keys = {"prompt_key": "q", "response_key": "a"}

    def run(out: Path, workers: Any) -> None:
        scorer = LearnedScorer(ScorerConfig(ScorerKind.learned), out / "stages", None, reference(KINDS[1]))
        done = Filter(job(source, out, workers, scorer, label_key="level", **keys))
        done.run()
        if workers.rank == 0:
            write_outputs(done, out)

    run(tmp_path / "1", OneWorker())
    on_threads(2, lambda worker: run(tmp_path / "2", worker))
    assert outputs(tmp_path / "2") == outputs(tmp_path / "1")
    config = ScorerConfig(ScorerKind.learned, model=str(tmp_path / "1"), features=KINDS[1], reference="m")
    check = Mock(return_value="perhaps")
    models = Models(Mock(), check, lambda name, config: opened(config.features))
    stream = LineFilter(
        InputConfig(input="-", **keys), FilterRules(scorer=config), make_scorer(config, models, tmp_path)
    )
    stream.run(io.BytesIO(source.read_bytes()), tmp_path / "stream")
    assert 0.3 < len((tmp_path / "stream" / "kept.jsonl").read_text().splitlines()) / len(rows) < 0.7
    reports: list[str] = []
    check_models(models, config, lambda: [], reports.append)
    assert reports == ["warning: scorer.reference: perhaps"] and check.call_args.args[0] == "m"
    check_models(models, replace(config, features=FeatureKind.ngrams), lambda: [], pytest.fail)


def test_settings_without_a_meaning_are_rejected(tmp_path):
    """Defaults change no hash, which decides the order of training samples."""
    with pytest.raises(ConfigError, match="reference: features=hidden needs a model"):
        ScorerConfig(ScorerKind.learned, features=FeatureKind.hidden)
    with pytest.raises(ConfigError, match="only the scorer learned has features"):
        ScorerConfig(ScorerKind.ngram, features=FeatureKind.hidden, reference="m")
    with pytest.raises(ConfigError, match="needs a model, and models cannot be opened here"):
        make_scorer(ScorerConfig(ScorerKind.learned, features=FeatureKind.hidden, reference="m"), None, tmp_path)
    config = ScorerConfig(ScorerKind.learned, reference="m")
    assert "features" not in decisive_settings(FilterRules(scorer=config))["scorer"]
    named = decisive_settings(FilterRules(scorer=replace(config, features=FeatureKind.hidden)))["scorer"]
    assert named["features"] == "hidden"


# -- planted bugs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "bug", "check"),
    [
        (linear, "_REFERENCE", 0.0, test_they_teach_what_no_ngram_shows),
        (
            linear,
            "_check_reference",
            lambda stored, given: None,
            test_a_stored_scorer_needs_the_model_that_it_learned_with,
        ),
    ],
)
def test_planted_bugs_are_noticed(tmp_path, monkeypatch, owner, name, bug, check):
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(tmp_path)
