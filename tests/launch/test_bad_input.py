"""Every bad input gets one line that says what to change, and the promised exit code, before anything is built."""

from __future__ import annotations

import json

import pytest

from launch.cli import main
from tests.support.tiny import TINY
from train.optim.optimizer import OptimizerConfig
from train.run_directory import RunDirectory


@pytest.fixture
def train(tmp_path, small_corpus, capsys):
    """Run `leviathan train` in this process; returns exit code and the lines of stderr."""

    def run(*overrides: str, name: str = "run") -> tuple[int, list[str]]:
        capsys.readouterr()
        own = [f"run.root={tmp_path}", f"run.name={name}", "training.steps=2"]
        code = main(["train", *TINY, *small_corpus, *own, *overrides])
        return code, capsys.readouterr().err.strip().splitlines()

    return run


FP8 = "precision=fp8 precision.backend=emulated"
CONFIGURATION = {
    "model.widht=64": "model.widht: no such key; try model.hidden_size",
    "model.hidden_size=wide": "model.hidden_size=wide: Value 'wide' of type 'str' could not be converted to Integer",
    "model=gpt5": "model=gpt5: no such choice; try behemoth, llama4_maverick, llama4_scout,",
    "model.num_kv_heads=3": "model.num_kv_heads=3: must divide the 4 query heads; try 1, 2 or 4",
    "model.router.top_k=9": "model.router.top_k=9: must not exceed the 4 experts",
    "model.router.score=relu": "model.router.score=relu: Invalid value 'relu', expected one of [sigmoid, softmax]",
    "training.micro_batch_size=3": "training.micro_batch_size=3: must divide a rank's 8 sequences; try 1, 2, 4 or 8",
    "parallel.dp_shard=2": "parallel.dp_shard=2: times pp * dp_replicate * cp * tp = 1 must equal the world's",
    "optimizer.groups.routr.lr_scale=2": "groups.routr: no such entry; try +optimizer.groups.routr=... to add one",
    "+optimizer.groups.routr.lr_scale=2": "optimizer.groups.routr: no such role; try embedding",
    "data.sources.text.weight=0": "data.sources.text.weight=0.0: must be positive and finite; to drop the source, remove it",
    "phases=[{name: main, steps: 1}]": "phases: names must differ",
    "model.vocab_size=128": "=128: the tokenizer has 300 ids; the model needs at least as many rows; try 384",
    "training.seq_len=100000": "less than one sequence of 100000 tokens",
    "model.shared_expert_hidden_size=-8": "model.shared_expert_hidden_size=-8: must not be negative",
    "model.rope_theta=0": "model.rope_theta=0.0: must be positive",
    "model.init.std=-1": "model.init.std=-1.0: must not be negative",
    "model.router.scale=nan": "model.router.scale=nan: must be positive",
    "optimizer.lr=nan": "optimizer.lr=nan: must be positive",
    "optimizer.eps=-1": "optimizer.eps=-1.0: must be positive",
    "optimizer.weight_decay=-1": "optimizer.weight_decay=-1.0: must not be negative",
    "training.clip_norm=inf": "training.clip_norm=inf: must be positive",
    "evaluation.sequences=0": "evaluation.sequences=0: must be positive",
    "evaluation.every=-1": "evaluation.every=-1: must not be negative",
    "checkpoint.every=-1": "checkpoint.every=-1: must not be negative",
    "profile.steps=[99]": "profile.steps=99: the run ends after 2 steps, counted from 0",
    "phases=[{name: x, steps: 1, weights: {text: 0.0}}]": "phases.0.weights: name at least one source",
    "phases=[{name: x, steps: 1, weights: {text: -1.0, code: 2.0}}]": "phases.0.weights.text=-1.0: must not be",
    "phases=[{name: x, steps: 1, global_batch_size: 6, micro_batch_size: 4}]": "micro_batch_size=4: must divide",
    "precision=fp8": "precision.backend=te: cannot do blockwise here: ",
    "precision=fp16": "precision=fp16: no such choice; try bf16, fp32, fp64 or fp8",
    "precision.backend=cutlass": "precision.backend=cutlass: Invalid value 'cutlass', expected one of [native, te,",
    "precision.backend=torch": "precision.compute=float32: torch needs bfloat16 activations: add precision=fp8",
    "+launch.processes=2": "launch.processes=2: launch=inline is one process; add launch=torchrun",
    f"{FP8} model.dense_hidden_size=40": "precision.fp8_products=dense: the dense_gate of layer 0 is 40 x 32 on a rank, but blockwise",
    f"{FP8} model.expert_hidden_size=24": "precision.fp8_products=expert: the expert_gate_up of layer 1 is 24 x 32 on a rank",
    f"{FP8} precision.recipe=mxfp8": "precision.fp8_products=attention: the key of layer 0 is 16 x 32 on a rank, but mxfp8 takes",
    f"{FP8} precision.fp8_products=[router]": "precision.fp8_products=router: the router must not be rounded to FP8: remove it",
    f"{FP8} precision.fp8_products=[]": "precision.fp8_products: names no product: use precision.backend=native",
    f"{FP8} precision.fp8_products=[expert,expert]": "precision.fp8_products: names the same products twice",
    f"{FP8} precision.bf16_first_layers=9": "precision.bf16_first_layers=9: leaves none of the 4 layers in FP8",
    f"{FP8} precision.bf16_last_layers=4": "precision.bf16_last_layers=4: leaves none of the 4 layers in FP8",
}


@pytest.mark.parametrize("override, message", CONFIGURATION.items(), ids=CONFIGURATION.keys())
def test_a_wrong_configuration_is_one_line_and_exit_code_2(train, tmp_path, override, message):
    line = refusal(train(*(override.split() if override.startswith(FP8) else [override])))
    assert line.startswith("leviathan: error: ") and message in line
    assert not list(tmp_path.glob("*/checkpoints/*"))


def refusal(answer: tuple[int, list[str]], code: int = 2) -> str:
    """The one line of an error with this exit code."""
    assert answer[0] == code and len(answer[1]) == 1, answer
    return answer[1][0]


def test_the_right_configuration_is_accepted(train):
    """Control for all of the above. Documents of the test corpus are longer than 16 tokens and are cut."""
    assert train() == (0, []) == train("training.seq_len=16", name="short")


DATA = {
    "missing": (None, "no such file or folder"),
    "empty": (b"", "has no text"),
    "undecodable": (b"abc \xff\xfe def\n", "byte 4 is not UTF-8"),
}


@pytest.mark.parametrize("content, message", DATA.values(), ids=DATA.keys())
def test_bad_corpora_are_refused(train, tmp_path, content, message):
    folder = tmp_path / "texts"
    if content is not None:
        folder.mkdir()
        (folder / "one.txt").write_bytes(content)
    line = refusal(train(f"data.sources.text.path={folder}"))
    assert message in line and "data.sources.text" in line


def test_a_document_longer_than_the_limit_is_refused_when_asked(train):
    assert "data.limit_tokens" in refusal(train("data.long_documents=refuse", "data.limit_tokens=10"))


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_shard_is_refused(train, tmp_path, damage):
    cache = f"data.cache={tmp_path / 'cache'}"
    assert train(cache)[0] == 0
    shard = min(tmp_path.glob("cache/tokens/*/*.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content if damage == "flip" else content[:-2])
    line = refusal(train(cache, name="second"), 1)
    assert shard.name in line and "run again" in line
    code, _ = train(cache, "data.verify=false", name="third")
    assert (code == 0) == (damage == "flip"), "control: without verification a flipped bit goes unseen"


def test_resuming_with_another_configuration_is_refused(train):
    assert train()[0] == 0
    line = refusal(train("optimizer.lr=0.5"))
    assert "optimizer.lr=0.5" in line and f"was started with {OptimizerConfig().lr}" in line
    assert train("logging.every=2", "checkpoint.keep=1")[0] == 0, "what does not affect training may change"
    assert "holds a run already" in refusal(train("run.resume=false"))


def test_two_runs_under_one_name_are_refused(train, tmp_path):
    other = RunDirectory(tmp_path / "run")
    other.lock()
    assert "run.name=run: another process is training in" in refusal(train())
    other.release()
    assert train()[0] == 0, "control: released, it may be claimed"


def test_resuming_with_other_data_is_refused(train, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    words = [f"data.sources.text.path={folder}", "data.held_out=0", "checkpoint.every=1"]
    (folder / "one.txt").write_text("one two three four five " * 200)
    assert train(*words)[0] == 0
    (folder / "one.txt").write_text("one two three four six " * 200)
    assert "not the one this run was trained on" in refusal(train(*words))


def test_a_damaged_checkpoint_falls_back(train, tmp_path):
    run, words = tmp_path / "run", ["training.steps=4", "checkpoint.every=2"]
    assert train(*words)[0] == 0
    data = next((run / "checkpoints" / "step-00000004").glob("*.bin"))
    data.write_bytes(data.read_bytes()[:-1])
    (run / "summary.json").unlink()
    assert train(*words)[0] == 0
    log = (run / "log.txt").read_text()
    assert "step-00000004 is damaged" in log and "resuming from step-00000002" in log
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_verbs_name_a_run_that_is_not_there(verb, tmp_path, capsys):
    assert main([verb, f"run={tmp_path / 'nothing'}"]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main([verb]) == 2
    assert "run" in capsys.readouterr().err


def test_an_unknown_verb_and_option(capsys):
    assert main(["trian"]) == 2 and "verb=trian: no such verb; try train" in capsys.readouterr().err
    assert main(["train", "--gpu"]) == 2 and "no such option" in capsys.readouterr().err


def test_ranks_that_nobody_started_are_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(train()).startswith(
        "leviathan: error: WORLD_SIZE=2: is set, but not by torchrun: unset it, or start"
    )


@pytest.mark.parametrize("content", ["", "{", "- a list", "model: {width: [}"])
def test_an_unreadable_stored_configuration_is_one_line(tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_text(content)
    assert main(["evaluate", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
