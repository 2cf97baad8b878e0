"""Compare every family with transformers in float32: logits, loss and gradients. Controls break each feature once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import huggingface
from model.attention.plan import ForwardContext
from model.config import ModelConfig, QKNorm, RopePairing, RouterConfig, WeightsOn
from model.tensor_source import materialise, whole
from tests.support import hf_models

TOKENS = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(5))
"""The length, 13, is not a multiple of the attention chunk of 5."""


@pytest.mark.parametrize("name", hf_models.PEERS)
def test_logits_loss_and_every_gradient(name, tmp_path):
    theirs = hf_models.make(name)
    ours = huggingface.load(hf_models.save(theirs, tmp_path / "weights"))
    expected, logits = theirs(TOKENS, labels=TOKENS), ours(TOKENS)
    assert expected.logits.abs().max() > 1
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=5e-5)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    with torch.no_grad():  # save their gradients as weights, to read them under our names
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    gradients = huggingface.HuggingFaceCheckpoint(hf_models.save(theirs, tmp_path / "gradients"))
    tied = gradients.raw_config["tie_word_embeddings"]
    for key, parameter in ours.named_parameters():
        wanted, found = whole(gradients, key), parameter.grad
        if tied and key in ("embedding.weight", "head.weight"):
            found = ours.embedding.weight.grad + ours.head.weight.grad
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), key
        assert wanted.abs().max() > 0, key


def without_norms(config: ModelConfig) -> ModelConfig:
    return replace(config, layer_list=[replace(layer, qk_norm=QKNorm.none) for layer in config.blocks])


BROKEN = {
    "rope_pairing": ("scout", lambda c: replace(c, rope_pairing=RopePairing.halves)),
    "rope_scaling": ("scout", lambda c: replace(c, rope_scaling=None)),
    "chunk": ("scout", lambda c: replace(c, attention_chunk_size=6)),
    "temperature": ("scout", lambda c: replace(c, temperature=False)),
    "qk_norm": ("scout", lambda c: replace(c, qk_norm=QKNorm.none)),
    "qk_norm_added": ("maverick", lambda c: replace(c, qk_norm=QKNorm.weightless)),
    "qk_norm_per_head": ("qwen3_moe", without_norms),
    "qk_norm_full": ("olmoe", without_norms),
    "temperature_floor": ("scout", lambda c: replace(c, temperature_floor=5.0)),
    "temperature_scale": ("scout", lambda c: replace(c, temperature_scale=0.3)),
    **{f"norm_eps_{name}": (name, lambda c: replace(c, norm_eps=1e-5)) for name in hf_models.PEERS},
    "score_placement": ("scout", lambda c: replace(c, router=RouterConfig(weights_on=WeightsOn.output))),
    "nope": ("maverick", lambda c: replace(c, nope_every=0)),
    "halves": ("mixtral", lambda c: replace(c, rope_pairing=RopePairing.adjacent)),
    "norm_topk_prob": ("qwen3_moe", lambda c: replace(c, router=replace(c.router, norm_topk_prob=False))),
    "not_renormalised": ("olmoe", lambda c: replace(c, router=replace(c.router, norm_topk_prob=True))),
    "latent_pairs": ("deepseek_v3", lambda c: replace(c, rope_pairing=RopePairing.halves)),
    "yarn": ("deepseek_v3", lambda c: replace(c, rope_yarn=None)),
    "yarn_of_logits": ("deepseek_v3", lambda c: replace(c, rope_yarn=replace(c.rope_yarn, mscale_all_dim=0.0))),
    "yarn_of_turns": ("deepseek_v3", lambda c: replace(c, rope_yarn=replace(c.rope_yarn, mscale=0.2))),
    "groups": ("deepseek_v3", lambda c: replace(c, router=replace(c.router, top_groups=3))),
    "selection_bias": ("deepseek_v3", lambda c: replace(c, router=replace(c.router, selection_bias=False))),
    "routed_scale": ("deepseek_v3", lambda c: replace(c, router=replace(c.router, scale=1.0))),
    "score_on_input": ("mixtral", lambda c: replace(c, router=replace(c.router, weights_on=WeightsOn.input))),
}


@torch.no_grad()
@pytest.mark.parametrize("name, change", BROKEN.values(), ids=BROKEN.keys())
def test_the_comparison_notices_each_feature(name, change, tmp_path):
    theirs = hf_models.make(name)
    checkpoint = huggingface.HuggingFaceCheckpoint(hf_models.save(theirs, tmp_path))
    expected = theirs(TOKENS).logits
    assert (expected - materialise(checkpoint)(TOKENS)).abs().max() <= 5e-5
    checkpoint.config = change(checkpoint.config)
    assert (expected - materialise(checkpoint)(TOKENS)).abs().max() > 0.05


@pytest.mark.parametrize("name", ["scout", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_packed_documents_equal_separate_runs_of_transformers(name, tmp_path):
    """transformers' query temperature ignores positions in documents, so transformers runs each document alone."""
    theirs = hf_models.make(name)
    ours = huggingface.load(hf_models.save(theirs, tmp_path))
    lengths = (4, 7, 2)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = ours(TOKENS[:1], ForwardContext(positions))[0]
    for document, found in zip(TOKENS[0].split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(found, theirs(document[None]).logits[0], rtol=0, atol=5e-5)
    leaking = ours(TOKENS[:1])[0]
    assert (leaking[4:] - packed[4:]).abs().max() > 0.05, "control: without boundaries the logits differ"
