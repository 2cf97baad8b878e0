"""Test `import`, `export`, `model.init_from` and upcycling with small checkpoints that transformers wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from core.errors import CheckpointError, ConfigError
from data.tokenizer import save_for_transformers
from launch.cli import main
from model import huggingface
from model.config import ModelConfig, RouterConfig, Score, UpcycleConfig, UpcycleMethod, WeightsOn
from model.tensor_source import materialise, whole
from model.upcycle import Upcycled, keeps_the_function
from tests.support import hf_models, tiny
from tests.support.hf_models import like
from train.checkpoint.init_from import initial_source, open_model
from train.checkpoint.reader import IMPORTED, TOKENIZER
from train.config import Check
from train.convert import export_checkpoint, import_checkpoint

QUIET = lambda line: None  # noqa: E731


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    names = ("maverick", "qwen3_moe", "llama", "qwen3")
    return {name: hf_models.save(hf_models.make(name), root / name) for name in names}


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "maverick"
    import_checkpoint(saved["maverick"], out, check=Check.never)
    return out


@pytest.fixture
def copied(imported, tmp_path) -> Path:
    """Return a copy of an imported model that a test may damage."""
    return Path(shutil.copytree(imported, tmp_path / "in"))


@pytest.mark.parametrize("name", ["maverick", "qwen3_moe"])
def test_import_export_import_is_bit_identical(saved, tmp_path, name, capsys):
    first, out, second = tmp_path / "first", tmp_path / "out", tmp_path / "second"
    saved[name].joinpath("tokenizer.json").write_text('{"kept": true}')
    assert main(["import", str(saved[name]), str(first)]) == 0
    assert main(["export", str(first), str(out)]) == 0
    assert main(["import", f"source={out}", f"out={second}"]) == 0
    assert capsys.readouterr().out.count("logits equal transformers' to") == 3
    originals, copies = open_model(saved[name]), open_model(second)
    assert originals.shapes == copies.shapes
    for key in originals.shapes:
        assert torch.equal(whole(originals, key), whole(copies, key)), key
    assert (out / "tokenizer.json").read_text() == '{"kept": true}'
    before, after = (json.loads((path / "config.json").read_text()) for path in (saved[name], out))
    assert after["eos_token_id"] == before["eos_token_id"] == 2


@pytest.mark.parametrize("verb", ["import", "export"])
@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_link_to_a_file_elsewhere_is_not_copied(saved, tmp_path, capsys, verb, name):
    source, secret, out = Path(shutil.copytree(saved["qwen3"], tmp_path / "in")), tmp_path / "secret", tmp_path / "out"
    secret.write_text("secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../secret")
    assert main([verb, str(source), str(out), "check=never"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is a link to {secret}, outside of {source}: replace it by a copy" in line
    assert not out.exists()


@pytest.mark.parametrize("layout", ["beside", "hub"])
def test_links_inside_a_model_are_copied(saved, tmp_path, layout):
    """`beside`: a link to a file in the same folder, which is reached by a link. `hub`: the cache of the hub."""
    hub = tmp_path / "models--acme--small"
    source = Path(shutil.copytree(saved["qwen3"], hub / "snapshots/0123" if layout == "hub" else tmp_path / "in"))
    blob = hub / "blobs/ab12" if layout == "hub" else source / "ab12"
    blob.parent.mkdir(exist_ok=True)
    blob.write_text('{"kept": true}')
    (source / "tokenizer.json").symlink_to("../../blobs/ab12" if layout == "hub" else "ab12")
    (tmp_path / "link").symlink_to(source)
    import_checkpoint(tmp_path / "link", tmp_path / "out", check=Check.never)
    copy = tmp_path / "out" / TOKENIZER / "tokenizer.json"
    assert copy.read_text() == '{"kept": true}' and not copy.is_symlink()


@pytest.mark.parametrize("target", ["models--acme--other/blobs/ab12", "secret"])
def test_a_link_out_of_a_repository_is_refused(saved, tmp_path, target):
    source = Path(shutil.copytree(saved["qwen3"], tmp_path / "models--acme--small/snapshots/0123"))
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / target)
    with pytest.raises(CheckpointError, match=r"outside of .*models--acme--small: replace it"):
        import_checkpoint(source, tmp_path / "out", check=Check.never)


def test_what_was_not_compared_is_said_and_written_down(saved, tmp_path, capsys, monkeypatch):
    def checked(out: str, check: Check = Check.auto) -> str:
        import_checkpoint(saved["maverick"], tmp_path / out, check=check)
        recorded = yaml.safe_load((tmp_path / out / IMPORTED).read_text())["origin"]["checked"]
        assert recorded in capsys.readouterr().out
        return recorded

    assert "logits equal" in checked("all")
    assert checked("nothing", Check.never) == "neither settings nor logits compared with transformers: check=never"
    monkeypatch.setattr("model.huggingface.check.available_memory", lambda: 1000)
    assert "settings equal transformers'; logits not compared: both models need" in checked("settings")
    with pytest.raises(CheckpointError, match="cannot compare with transformers: both models need"):
        checked("refused", Check.always)
    export_checkpoint(tmp_path / "all", tmp_path / "out")
    assert "logits not compared" in capsys.readouterr().out


def test_settings_are_compared_where_logits_are_not(saved, tmp_path, monkeypatch):
    family = huggingface.FAMILIES["llama4_text"]
    wrong = replace(family, read=lambda config: replace(family.read(config), temperature_floor=9.0))
    monkeypatch.setitem(huggingface.FAMILIES, "llama4_text", wrong)
    monkeypatch.setattr("model.huggingface.check.available_memory", lambda: 1000)
    with pytest.raises(CheckpointError, match=r"reads its config.json as model.temperature_floor=4, not 9.0"):
        import_checkpoint(saved["maverick"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_directory_that_appears_meanwhile_stays(saved, imported, tmp_path, monkeypatch, verb):
    out = tmp_path / "out"

    def compared(*arguments) -> str:
        out.mkdir()
        (out / "theirs").touch()
        return ""

    monkeypatch.setattr("train.convert._compare", compared)
    with pytest.raises(ConfigError, match="appeared while it was being made"):
        if verb == "import":
            import_checkpoint(saved["maverick"], out)
        else:
            export_checkpoint(imported, out)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    (kept,) = (path for path in tmp_path.iterdir() if path.name.startswith("out."))
    assert open_model(kept).shapes == open_model(imported).shapes


@pytest.fixture(scope="module")
def runnable(tmp_path_factory) -> Path:
    """Save a Llama 4 whose vocabulary fits the tokenizer of the tiny run."""
    root = tmp_path_factory.mktemp("runnable") / "hf"
    return hf_models.save(hf_models.make("maverick", vocab_size=320), root)


def line(path: Path, *overrides: str) -> list[str]:
    return [*tiny.EXACT, *like(path), "data.tokenizer.vocab_size=320", f"model.init_from={path}", *overrides]


def start(path: Path, root: Path, *overrides: str):
    return tiny.trainer(root, "run", line(path, *overrides))


@pytest.mark.slow
def test_an_imported_model_trains_and_is_exported(runnable, tmp_path):
    import_checkpoint(runnable, tmp_path / "imported")
    losses = []
    for path in (runnable, tmp_path / "imported"):
        trainer = start(path, tmp_path / path.name, "model.balance.bias_rate=0", "training.steps=2")
        source = open_model(runnable)
        for name, parameter in trainer.engine.placed.model.named_parameters():
            assert torch.equal(parameter.detach().float(), whole(source, name)), name
        assert trainer.fit() == 0
        losses.append(json.loads((trainer.directory.path / "summary.json").read_text())["train_loss"])
    assert losses[0] == losses[1]
    export_checkpoint(trainer.directory.path, tmp_path / "trained", check=Check.always)
    exported, trained = huggingface.HuggingFaceCheckpoint(tmp_path / "trained"), open_model(trainer.directory.path)
    assert all(torch.equal(whole(exported, key), whole(trained, key)) for key in trained.shapes)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "trained")("def main():")["input_ids"]
    tokenizer = trainer.corpus.tokenizer
    assert ids == [tokenizer.bos_id, *tokenizer.encode(["def main():"])[0]]


def test_a_resumed_run_does_not_start_over_from_the_checkpoint(runnable, tmp_path):
    first = tiny.saved(tmp_path, "run", line(runnable, "training.steps=4", "checkpoint.every=2"), 2)
    again = start(runnable, tmp_path, "training.steps=4", "checkpoint.every=2")
    assert again.step == 2
    pairs = zip(first.engine.placed.model.parameters(), again.engine.placed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_selection_biases_are_not_dropped_silently(runnable, tmp_path):
    trainer = start(runnable, tmp_path, "training.steps=1", "model.balance.bias_rate=0.01")
    assert trainer.fit() == 0
    with pytest.raises(ConfigError, match="drop_selection_bias"):
        export_checkpoint(trainer.directory.path, tmp_path / "out")
    export_checkpoint(trainer.directory.path, tmp_path / "out", drop_selection_bias=True)


def test_another_tokenizer_than_the_first_weights_is_told(small_corpus, runnable, tmp_path):
    def said(name: str, source: Path, *overrides: str) -> str:
        tiny.trainer(tmp_path, name, [*tiny.EXACT, *overrides, f"model.init_from={source}"])
        log = (tmp_path / name / "log.txt").read_text()
        (line,) = (line for line in log.splitlines() if "initial weights: " in line)
        return line

    first = tiny.saved(tmp_path, "first", [*tiny.EXACT, *small_corpus])
    run, ours = first.directory.path, first.vocabulary[:12]
    assert f"trained with this run's tokenizer ({ours})" in said("same", run, *small_corpus)
    told = said("other", run, *small_corpus, "data.tokenizer.vocab_size=290")
    assert f"with another tokenizer ({ours}) than this run's (" in told

    import_checkpoint(runnable, tmp_path / "imported")
    same = [*like(runnable), *small_corpus]
    assert "their tokenizer is unknown" in said("unknown", tmp_path / "imported", *same)
    folder = tmp_path / "imported" / TOKENIZER
    save_for_transformers(first.corpus.tokenizer, folder)
    assert f"trained with this run's tokenizer ({ours})" in said("known", tmp_path / "imported", *same)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("the", "eth"))
    assert "with another tokenizer" in said("changed", tmp_path / "imported", *same)


def test_a_run_needs_its_corpus_only_to_train_and_evaluate(tmp_path, capsys, monkeypatch):
    """Relative paths are stored as absolute ones, and the tokenizer is kept: the run works in any folder."""
    notes, away = tmp_path / "home" / "notes", tmp_path / "away"
    for folder in (notes, away):
        folder.mkdir(parents=True)
    for number in range(60):
        (notes / f"{number}.txt").write_text(f"{number} the quick brown fox " * 40)
    corpus = ["data=files", "data.sources.text.path=notes", f"data.cache={tmp_path / 'cache'}"]
    line = [*tiny.TINY, *corpus, "data.tokenizer.vocab_size=300", f"run.root={tmp_path}", "run.name=run"]
    monkeypatch.chdir(notes.parent)
    assert main(["train", *line, "training.steps=1", "evaluation.sequences=1", "data.held_out=0.2"]) == 0
    monkeypatch.chdir(away)
    run = str(tmp_path / "run")
    assert main(["evaluate", run]) == 0, "the corpus is found from another folder"
    shutil.rmtree(notes)
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert main(["evaluate", run]) == 2
    assert f"data.sources.text.path={notes}: no such file or folder" in capsys.readouterr().err
    assert main(["generate", run, "the", "tokens=2"]) == 0
    export = ["export", run, str(tmp_path / "out"), "drop_selection_bias=true", "check=never"]
    kept = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    text = kept.read_text()
    kept.write_text(text.replace("Ġ", "G"))
    assert main(export) == 1
    assert "is not the tokenizer that the model was trained with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    kept.write_text(text)
    assert main(export) == 0


def test_another_network_is_refused_with_the_differences(runnable, saved, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.expert_hidden_size=32 there, 64 here"):
        start(runnable, tmp_path, "model.expert_hidden_size=64")
    with pytest.raises(ConfigError, match=r"model.init_from.*no such directory"):
        initial_source(ModelConfig(init_from=str(tmp_path / "nothing")), 0, QUIET)
    mixture = replace(open_model(saved["qwen3_moe"]).config, init_from=str(saved["qwen3_moe"]), upcycle=UpcycleConfig())
    with pytest.raises(ConfigError, match="is a mixture-of-experts model already; remove upcycle"):
        initial_source(mixture, 0, QUIET)


def test_damage_of_an_imported_model_is_noticed(copied, tmp_path):
    data = next(copied.glob("checkpoints/step-00000000/*.bin"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        export_checkpoint(copied, tmp_path / "out", check=Check.never)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


MANIFEST_DAMAGE = {
    "no_config": (lambda content: content["origin"].pop("config"), "origin lacks its family or its config"),
    "no_family": (lambda content: content["origin"].pop("family"), "origin lacks its family or its config"),
    "odd_origin": (lambda content: content.update(origin=[]), "it has no origin"),
    "no_model": (lambda content: content.pop("model"), "it has no model"),
    "old_key": (lambda content: content["model"].update(heads=4), "older format (heads: was renamed to num_heads)"),
    "garbled": (None, "model.yaml: line 1, column 9: expected the node content"),
}


@pytest.mark.parametrize("change, message", MANIFEST_DAMAGE.values(), ids=MANIFEST_DAMAGE.keys())
def test_a_damaged_model_yaml_is_one_line(copied, tmp_path, capsys, change, message):
    text = "model: ["
    if change is not None:
        content = yaml.safe_load((copied / IMPORTED).read_text())
        change(content)
        text = yaml.safe_dump(content)
    (copied / IMPORTED).write_text(text)
    capsys.readouterr()
    assert main(["export", str(copied), str(tmp_path / "out"), "check=never"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def with_experts(dense: ModelConfig, **changes) -> ModelConfig:
    base = replace(
        dense,
        moe_every=2,
        num_experts=4,
        expert_hidden_size=dense.dense_hidden_size,
        shared_expert_hidden_size=0,
        router=RouterConfig(top_k=2, score=Score.softmax, norm_topk_prob=True, weights_on=WeightsOn.output),
        upcycle=UpcycleConfig(),
        init_from="dense",
    )
    return replace(base, **changes)


SPLIT = UpcycleConfig(UpcycleMethod.split)
SCALED = RouterConfig(3, Score.sigmoid, norm_topk_prob=True, scale=2.5, weights_on=WeightsOn.output)
UPCYCLED = {
    "copy": ({}, True),
    "split": ({"upcycle": SPLIT, "expert_hidden_size": 24, "num_experts": 8}, True),
    "split_scaled": ({"upcycle": SPLIT, "expert_hidden_size": 16, "num_experts": 6, "router": SCALED}, True),
    "shared": ({"shared_expert_hidden_size": 48, "expert_hidden_size": 32, "router": RouterConfig()}, True),
    "noise": ({"upcycle": UpcycleConfig(UpcycleMethod.noise, noise_std=0.05)}, False),
    "llama4_router": ({"router": RouterConfig()}, False),
}


@pytest.mark.parametrize("changes, equal", UPCYCLED.values(), ids=UPCYCLED.keys())
def test_upcycling_keeps_the_loss_where_it_promises(saved, changes, equal):
    dense = open_model(saved["qwen3"])
    config = with_experts(dense.config, **changes)
    tokens = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = huggingface.load(saved["qwen3"])(tokens)
    model = materialise(Upcycled(dense, config, seed=3))
    assert keeps_the_function(config) is equal
    difference = float((model(tokens) - expected).detach().abs().max())
    assert (difference < 5e-5) if equal else (difference > 1e-2)


def test_blocks_equal_slices(saved, imported):
    """Reading a block gives that slice of the whole tensor, also for imported and upcycled models."""
    dense = open_model(saved["qwen3"])
    upcycled = [Upcycled(dense, with_experts(dense.config, **changes), seed=3) for changes, _ in UPCYCLED.values()]
    for source in (open_model(saved["maverick"]), open_model(imported), *upcycled):
        for key, shape in source.shapes.items():
            offset, part = [size // 3 for size in shape], [max(1, size // 2) for size in shape]
            window = tuple(slice(o, o + p) for o, p in zip(offset, part, strict=True))
            assert torch.equal(source.read(key, offset, part), whole(source, key)[window]), key


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"expert_hidden_size": 24}, "model.expert_hidden_size"),
        ({"dense_hidden_size": 96}, "model.init_from"),
        ({"shared_expert_hidden_size": 32}, "model.shared_expert_hidden_size"),
        ({"upcycle": SPLIT, "expert_hidden_size": 24, "num_experts": 5}, "model.num_experts"),
        ({"upcycle": SPLIT, "expert_hidden_size": 40}, "model.expert_hidden_size"),
    ],
)
def test_widths_that_do_not_fit_are_refused(saved, changes, key):
    config = with_experts(open_model(saved["qwen3"]).config, **changes)
    with pytest.raises(ConfigError) as caught:
        initial_source(replace(config, init_from=str(saved["qwen3"])), 0, QUIET)
    assert caught.value.key == key


CONVERT = """
import re, sys
from pathlib import Path
from train.config import Check
from train.convert import export_checkpoint, import_checkpoint
root = Path(sys.argv[1])
import_checkpoint(root / "hf", root / "in", check=Check.never)
export_checkpoint(root / "in", root / "out", check=Check.never)
status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's memory
print("peak", int(re.search("VmHWM: *[ \\t]*(\\d+)", status)[1]) * 1024)
"""


def peak_memory(root: Path, experts: int) -> int:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 128}
    model = hf_models.make("scout", **sizes, num_hidden_layers=1, num_local_experts=experts)
    hf_models.save(model.bfloat16(), root / "hf")
    command = [sys.executable, "-c", CONVERT, str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for name in ("hf", "out"):
        files = list((root / name).glob("*.safetensors"))
        assert sum(path.stat().st_size for path in files) > experts * 3 * 1024 * 2048 * 2
    return int(done.stdout.split("peak")[1])


@pytest.mark.slow
def test_memory_of_a_conversion_does_not_grow_with_the_tensor(tmp_path):
    """An expert is 12 MB; with four times as many the file has 288 MB more."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    assert abs(peak_memory(large, 32) - peak_memory(small, 8)) < 80e6
