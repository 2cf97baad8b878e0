"""Every bad input gets one line that says what to change, and the promised exit code, before anything is built."""

from __future__ import annotations

import pytest

from launch.cli import main
from tests.support.tiny import TINY
from train.optim.config import OptimizerConfig
from train.run_directory import RunDirectory


@pytest.fixture
def words(tmp_path, small_corpus) -> list[str]:
    return ["train", *TINY, *small_corpus, f"run.root={tmp_path}", "run.name=run", "training.steps=2"]


FP8 = "precision=fp8 precision.backend=emulated"
CONFIGURATION = {
    "model.widht=64": "model.widht: no such key; try model.hidden_size",
    "lr=0.1": "lr: no such key; try optimizer.lr or optimizer.muon.lr",
    "runname=x": "runname: no such key; try run.name",
    "training.steps=1e3": "could not be converted to Integer; try 1000",
    "model=gpt5": "model=gpt5: no such choice; try behemoth, deepseek_v3, glyph_towers,",
    "model.num_kv_heads=3": "model.num_kv_heads=3: must divide the 4 query heads; try 1, 2 or 4",
    "model.head_dim=7": "model.head_dim=7: must be even: the rotation acts on pairs",
    "model.num_experts=1": "model.num_experts=1: must be at least 2; moe_every=0 makes every layer dense",
    "model.hidden_size=0": "model.hidden_size=0: must be positive",
    "model.expert_hidden_size=12": "model.expert_hidden_size=12: must be a multiple of 8 for the grouped matmul",
    "model.layer_list=[]": "model.layer_list: has 0 layers, but model.num_layers is 4",
    "model.router.top_k=9": "model.router.top_k=9: must not exceed the 4 experts",
    "model.router.score=relu": "model.router.score=relu: Invalid value 'relu', expected one of [sigmoid, softmax]",
    "phases=[{name: main, steps: 1}]": "phases: names must differ",
    "model.vocab_size=128": "=128: the tokenizer has 300 ids, and the model needs at least as many; try 384",
    "training.seq_len=100000": "less than one sequence of 100000 tokens",
    "model.init.std=-1": "model.init.std=-1.0: must not be negative",
    "model.router.scale=nan": "model.router.scale=nan: must be a finite number",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a finite number",
    "training.clip_norm=inf": "training.clip_norm=inf: must be a finite number",
    "evaluation.sequences=0": "evaluation.sequences=0: must be positive",
    "checkpoint.every=-1": "checkpoint.every=-1: must not be negative",
    "profile.steps=[99]": "profile.steps=99: the run has 2 steps, counted from 0",
    "phases=[{name: x, steps: 1, weights: {text: -1.0, code: 2.0}}]": "phases.0.weights.text=-1.0: must not be",
    "phases=[{name: x, steps: 1, global_batch_size: 6, micro_batch_size: 4}]": "micro_batch_size=4: must divide",
    "precision=fp8": "precision.backend=te: cannot do blockwise here: ",
    "precision.backend=torch": "precision.compute=float32: torch needs bfloat16 activations: add precision=fp8",
    "+launch.processes=2": "launch.processes=2: launch=inline is one process; add launch=torchrun",
    f"{FP8} precision.recipe=mxfp8": "precision.fp8_products=attention: the key of layer 0 is 16 x 32 on a rank, but mxfp8 takes",
    f"{FP8} precision.fp8_products=[expert,expert]": "precision.fp8_products: names the same products twice",
}


@pytest.mark.parametrize("override, message", CONFIGURATION.items(), ids=CONFIGURATION.keys())
def test_a_wrong_configuration_is_one_line_and_exit_code_2(refused, words, tmp_path, override, message):
    line = refused(*words, *(override.split() if override.startswith(FP8) else [override]))
    assert message in line and not list(tmp_path.glob("*/checkpoints/*"))


def test_the_right_configuration_is_accepted(words, capsys):
    """Control for the tests above. Documents of the test corpus are longer than 16 tokens and are cut."""
    assert main(words) == 0 == main([*words, "training.seq_len=16", "run.name=short"])
    assert capsys.readouterr().err == ""


SLURM = "train launch=slurm launch.processes=1"
TWO_NODES = "train launch=torchrun launch.nodes=2"
SECOND = f"{TWO_NODES} launch.node_rank=1"
STREAM = "filter stream scorer.kind=random"
COMMANDS = {
    "trian": "verb=trian: no such verb; try train",
    "generate x -item": "-item: no such option; keys are written KEY=VALUE, and a prompt that begins so prompt=-item",
    "train --config a --config=b": "--config: name one stored configuration only",
    "train --gpu": "--gpu: no such option; keys are written KEY=VALUE; try --help or --cfg",
    "evaluate": "run: ",
    "evaluate run=nothing": "run=nothing: no run there",
    "train launch=slurm": "launch.processes: give the number of ranks per node, usually its number of GPUs; try 8",
    f"{SLURM} launch.slurm.time=soon": "launch.slurm.time=soon: must read as sbatch's --time",
    f"{SLURM} launch.slurm.time=4": "launch.slurm.time=4: is not longer than the 300 s reserved",
    SLURM: "launch=slurm: sbatch is not on this machine: submit from a login node",
    TWO_NODES: "launch.node_rank: each node's command needs its own number; try 0 or 1",
    f"{TWO_NODES} launch.node_rank=2": "launch.node_rank=2: each node's command needs its own number",
    SECOND: "launch.rendezvous: several nodes need the same HOST:PORT of node 0",
    f"{SECOND} launch.rendezvous=node0": "launch.rendezvous=node0: must be",
    f"{SECOND} launch.rendezvous='::1:29500'": (
        "launch.rendezvous=::1:29500: write an IPv6 address in brackets: [ADDRESS]:PORT; try [::1]:29500"
    ),
    f"{SLURM} launch.nodes=3 parallel.tp=2": "parallel.tp=2: tp = 2 must divide the world's 3",
    f"{SECOND} launch.processes=1 launch.rendezvous=a:1": "run.name: is required with several nodes",
    "train launch=torchrun launch.node_rank=0": "launch.node_rank=0: does not apply to one node; add launch.nodes=2",
    "train launch=torchrun launch.restarts=-1": "launch.restarts=-1: must not be negative",
    "train launch=torchrun launch.processes=1,2": "launch.processes=2: differs from the first run of the sweep (1); give",
    "train launch=inline,torchrun": "launch.kind=torchrun: differs from the first run of the sweep (inline); give",
    "metap transfer": "base: name what to transfer from",
    "metap transfer base=nowhere.yaml": "base=nowhere.yaml: cannot be read",
    "metap check check.width=[4,2]": "check.width: needs ascending factors",
    "metap check check.width=[] check.depth=[] check.experts=[]": "check.width: no axis is left to check",
    "metap model.moe_every=0": "check.experts: the model has no experts",
    "metap sweep sweep.low=-3 sweep.high=-4": "sweep.low=-3.0: must be below sweep.high=-4",
    "metap sweep sweep.step=0": "sweep.step=0.0: must be positive",
    "metap sweep optimizer.lr=0.1,0.2": "optimizer.lr: is swept by sweep.low",
    "metap fit fit.runs=[nowhere]": "fit.runs: no run in nowhere",
    "metap sweep modle.width=3": "modle: no such key",
    "train model.width=64": "model.width: was renamed to model.hidden_size",
    "train +model.rope_scaling.low=2": "model.rope_scaling.low: was renamed to model.rope_scaling.low_freq_factor",
    "train phases=[{name:x,steps:1,context:64}]": "phases.0.context: was renamed to phases.0.seq_len",
    "train precision.backend=bf16": "precision.backend=bf16: was renamed to native",
    "train launch=slurm launch.slurm.together=2": "launch.slurm.together: was renamed to launch.slurm.max_concurrent",
    "train launch=slurm +launch.slurm.together=2": "launch.slurm.together: was renamed to launch.slurm.max_concurrent",
    "metap check model.heads=4": "model.heads: was renamed to model.num_heads",
    "filter stream": "scorer.kind=ngram: needs all records before it scores the first, and a stream has no end; try loss",
    f"{STREAM} input=a.jsonl": "input=a.jsonl: has no effect on filter stream, which reads JSON lines",
    f"{STREAM} select.floor=2": "select.floor=2: cannot be applied to a stream, whose number of records",
    "filter ablate ablate.seeds=9": "ablate.seeds=9: must be",
    "filter ablate ablate.steps=0": "ablate.steps=0: must be positive",
    "filter ablate tokenizer=a": (
        "tokenizer=a: has no effect on filter ablate, whose data are those of leviathan train (docs/filter.md); "
        """try 'ablate.train=["data=files","data.sources.text.path=FOLDER"]'"""
    ),
}


@pytest.mark.parametrize("command, message", COMMANDS.items(), ids=COMMANDS.keys())
def test_a_wrong_command_is_one_line_and_exit_code_2(refused, monkeypatch, tmp_path, command, message):
    """SLURM's commands are not on PATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(*command.split()).startswith(message)
    assert {path.name for path in tmp_path.iterdir()} <= {"metap"}


def test_a_damaged_shard_is_refused(refused, words, tmp_path):
    words.append(f"data.cache={tmp_path / 'cache'}")
    assert main(words) == 0
    shard = min(tmp_path.glob("cache/tokens/*/*.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    line = refused(*words, "run.name=second", code=1)
    assert shard.name in line and "run again" in line
    assert main([*words, "data.verify=false", "run.name=third"]) == 0, "control: not noticed without verification"


def test_resuming_while_it_runs_or_otherwise_set_is_refused(refused, words, tmp_path):
    other = RunDirectory(tmp_path / "run")
    other.lock()
    assert "run.name=run: another process is training in" in refused(*words)
    other.release()
    assert main(words) == 0, "control: a released run can be claimed"
    line = refused(*words, "optimizer.lr=0.5")
    assert "optimizer.lr=0.5" in line and f"was started with {OptimizerConfig().lr}" in line
    assert main([*words, "logging.every=2", "checkpoint.keep=1"]) == 0, "other settings may change"
    assert "holds a run already" in refused(*words, "run.resume=false")


def test_resuming_with_other_data_is_refused(refused, words, tmp_path):
    text = tmp_path / "texts" / "one.txt"
    text.parent.mkdir()
    words += [f"data.sources.text.path={text.parent}", "data.held_out=0", "checkpoint.every=1"]
    text.write_text("one two three four five " * 200)
    assert main(words) == 0
    text.write_text("one two three four six " * 200)
    assert "not the one this run was trained on" in refused(*words)


def test_ranks_that_nobody_started_are_refused(refused, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(*words).startswith("WORLD_SIZE=2: is set, but not by torchrun: unset it, or start")


NO_KEYS = "config.yaml: has no keys: it is empty, or not a configuration"


@pytest.mark.parametrize(
    "content, why", [("", NO_KEYS), ("{", "config.yaml: line 1, column 2: expected"), ("- a list", NO_KEYS)]
)
def test_an_unreadable_stored_configuration_is_one_line(refused, tmp_path, content, why):
    (tmp_path / "config.yaml").write_text(content)
    assert why in refused("evaluate", str(tmp_path))
