"""The n-gram scorer: normalised probabilities, cross-fitted scores independent of batches, and a bounded sample."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.input.records import Record
from data.filter.score.ngram import MAX_ORDER, NgramModel, NgramScorer

WORDS = "the a cat dog sees hears likes finds old new house tree near under red small big"


def sentences(count: int, seed: int = 0) -> list[Record]:
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS.split(), k=chance.randint(5, 40))) + "." for _ in range(count)]
    return [Record(str(number), "text", f"made:{number}", text) for number, text in enumerate(texts)]


def fitted(records: list[Record], **settings: int) -> NgramScorer:
    scorer = NgramScorer(**settings)
    scorer.fit(lambda: iter(records))
    return scorer


def probabilities(model: NgramModel, context: bytes) -> np.ndarray:
    """Return the probability of each next byte after the context."""
    losses = model.losses([context] * 256, [bytes([byte]) for byte in range(256)])
    return np.exp(-losses / (1 << 20))


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
@pytest.mark.parametrize("context", [b"", b"the ca", b"never seen \xff\xfe", b"sees the", b"x"])
def test_probabilities_add_up_to_one(order, context):
    model = NgramModel(order, [record.text.encode() for record in sentences(50)])
    assert probabilities(model, context).sum() == pytest.approx(1, abs=1e-4)


def test_probabilities_match_the_formula():
    """Use "abab" at order 2, after a zero byte. Pairs 0a and ba occur once, ab twice: the discount d_2 is 2/4.
    Two distinct bytes precede a, one precedes b: the discount d_1 is 1/3.
    """
    model = NgramModel(2, [b"abab"])
    unigram_a = (2 - 1 / 3) / 3 + (1 / 3) * 2 / 3 / 256
    unigram_b = (1 - 1 / 3) / 3 + (1 / 3) * 2 / 3 / 256
    p = probabilities(model, b"a")
    assert p[ord("b")] == pytest.approx((2 - 0.5) / 2 + 0.5 / 2 * unigram_b, rel=1e-5)
    assert p[ord("a")] == pytest.approx(0.5 / 2 * unigram_a, rel=1e-5)
    assert probabilities(model, b"z")[ord("a")] == pytest.approx(unigram_a, rel=1e-5)


@pytest.mark.parametrize("order", [2, 3, 5, 8])
def test_only_the_last_bytes_of_a_context_count(order):
    """A context longer than order - 1 bytes is cut; a shorter one counts as the start of the text."""
    model = NgramModel(order, [record.text.encode() for record in sentences(50)])
    whole = model.losses([b"the old cat"], [b" sees"])
    assert (model.losses([b"the old cat"[-(order - 1) :]], [b" sees"]) == whole).all()
    for size in range(12):
        context = b"the old cat"[:size]
        assert (model.losses([context], [b" sees"]) == model.losses([b""], [context + b" sees"])[size:]).all()
    assert (model.losses([b"zzzzzzzz"], [b" sees"]) != whole).any()


def test_text_like_the_data_is_easier_than_text_unlike_it():
    data = sentences(200)
    strange = Record("s", "text", "made:s", "qzx jvkw pfq zzxj wvq kqj")
    usual = Record("u", "text", "made:u", "the old cat sees a small red house.")
    scores = fitted([*data, strange, usual]).score([strange, usual])
    assert scores[0] > scores[1] + 1
    assert scores[0] < math.log(256) + 2


def test_scores_are_cross_fitted():
    """A unique text gets the same score in the data as outside it. Control: without folds it scores lower."""
    data = sentences(200)
    odd = Record("odd", "text", "made:odd", "Vexing quartz jumbles my glyphs, wickedly proud of 27 foxes!")
    copy = Record("copy", "text", "elsewhere:1", odd.text)
    without, within = fitted(data), fitted([*data, odd, copy])
    apart = without.score([odd])[0]
    assert within.score([odd, copy]).tolist() == [apart, apart]
    leaky = NgramModel(5, [record.text.encode() for record in [*data, odd]])
    memorised = leaky.losses([b""], [odd.text.encode()]).mean() / (1 << 20)
    assert memorised < apart - 1


def test_the_answer_alone_is_scored_in_the_context_of_its_prompt():
    """Use one model for both folds, so that it does not matter in which fold a record is."""
    data = sentences(200)
    model = NgramScorer()
    model.fit(lambda: data)
    model._models[0] = model._models[1]
    texts = {"usual": ("the old ", "cat"), "far": ("zqxjkv ~ the old ", "cat"), "near": ("the old q", "cat")}
    pairs = [Record(name, "t", "m", prompt + answer, len(prompt)) for name, (prompt, answer) in texts.items()]
    usual, far, near = model.score(pairs)
    assert usual == far < near


def test_scores_do_not_depend_on_the_batch():
    data = sentences(120)
    scorer = fitted(data, window=16)
    whole = scorer.score(data)
    one_by_one = np.concatenate([scorer.score([record]) for record in data])
    assert whole.tobytes() == one_by_one.tobytes()
    assert scorer.score(data[::-1])[::-1].tobytes() == whole.tobytes()


def test_the_sample_does_not_depend_on_the_order_and_is_bounded():
    data = sentences(300)
    small = fitted(data, sample_bytes=2000)
    assert small.score(data).tobytes() == fitted(data[::-1], sample_bytes=2000).score(data).tobytes()
    assert small.score(data).mean() > fitted(data).score(data).mean() + 0.1
    assert small.fingerprint != fitted(data).fingerprint


def test_an_empty_answer_has_no_score_and_strange_text_has_one():
    data = [*sentences(20), Record("e", "t", "m", "prompt", 6), Record("s", "t", "m", "snow ☃ and \0 and é")]
    scores = fitted(data).score(data)
    assert np.isnan(scores[-2]) and np.isfinite(np.delete(scores, -2)).all()


def test_without_data_all_bytes_are_equally_likely():
    alone = sentences(1)
    assert fitted(alone).score(alone)[0] == pytest.approx(math.log(256), abs=1e-5)


def test_fit_comes_first_and_the_order_is_checked():
    with pytest.raises(ValueError, match="fit"):
        NgramScorer().score(sentences(1))
    with pytest.raises(ConfigError, match="order"):
        NgramScorer(order=9)
