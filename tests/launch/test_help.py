"""What `leviathan VERB --help` and `--cfg` print."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from ast import literal_eval
from itertools import pairwise

import pytest

from core.config import build, load, plain
from data.config import Undecodable
from launch.cli import VERBS, main
from launch.config import LaunchConfig, SlurmConfig
from launch.help import describe
from train.config import TrainConfig


def keys_without_words(text: str) -> list[str]:
    """Return the keys of a help text that no comment explains."""
    lines = [*text.splitlines(), ""]
    return [
        line.partition("=")[0]
        for line, below in pairwise(lines)
        if re.match(r"[a-z][\w.]*=.*  \(.+\)$", line) and not below.startswith("    # ")
    ]


@pytest.mark.parametrize("name", VERBS)
def test_help_has_every_key_of_a_verb_with_words(name, capsys):
    verb = VERBS[name]
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    module = importlib.import_module(f"launch.verbs.{verb.module or name}")
    for field in dataclasses.fields(getattr(module, verb.config)):
        assert re.search(rf"^{field.name}[.=]", text, re.MULTILINE), field.name
    assert keys_without_words(text) == []


@dataclasses.dataclass(frozen=True)
class Documented:
    size: int = 1
    """Size in bytes."""
    silent: int | None = None
    policy: Undecodable = Undecodable.fail


def test_a_field_without_a_docstring_is_noticed(tmp_path):
    text = describe(Documented, {}, tmp_path, {})
    assert "size=1  (int)\n    # Size in bytes.\n" in text
    assert "\n    # Policy for bytes" in text, "the words of an enum explain a key"
    assert keys_without_words(text) == ["silent"]


def test_help_has_values_types_and_words(capsys):
    assert main(["--help"]) == 0 == main(["evaluate", "--help"])
    assert main(["train", "--help", "optimizer.lr=0.25"]) == 0
    assert main(["train", "--cfg", "model.hidden_size=256"]) == 0
    text = capsys.readouterr().out
    assert "\n  evaluate   held-out loss of a run" in text and "run=???  (str)" in text
    assert "model.hidden_size=128  (int)" in text, "the composed value, not the class's default"
    assert "optimizer.lr=0.25  (float)" in text and "launch.kind=inline  (inline | torchrun | slurm)\n" in text
    assert "data=builtin | captions | files | glyphs | huggingface | scenes | tokens" in text
    assert "training.clip_norm=1.0  (float | null)\n    # Global gradient norm above which" in text
    assert "data.sources.NAME.text_key=text  (str)" in text
    assert "\n  hidden_size: 256\n" in text and "\n  vocab_size: 1024\n" in text


def test_help_has_every_key_of_launch_with_its_type_and_words(capsys):
    assert main(["train", "--help", "launch=slurm", "launch.slurm.partition=gpu"]) == 0
    text = capsys.readouterr().out
    assert all(f"\nlaunch.slurm.{field.name}=" in text for field in dataclasses.fields(SlurmConfig))
    assert "launch.slurm.time=null  (str | null)\n" in text and "launch={" not in text
    assert "launch.slurm.save_s=300  (int)\n    # SLURM warns the run this many seconds" in text
    assert "launch.kind=slurm  (inline | torchrun | slurm)\n" in text
    assert "launch.slurm.partition=gpu  (str | null)" in text
    assert "# Options of sbatch and of the job; null: the cluster's default." in text


@pytest.mark.parametrize("kind", ["inline", "torchrun", "slurm"])
def test_the_choices_of_launch_repeat_the_defaults(kind):
    """Hydra accepts overrides only of keys in the YAML files, so these repeat the keys and defaults of the class."""
    launch = load("train", TrainConfig, [f"launch={kind}"]).launch
    needed = {"kind": kind, **({"processes": 8} if kind == "slurm" else {})}
    full = plain(build(LaunchConfig, needed))
    assert {**launch, **needed} == {key: full[key] for key in launch}
    left_out = {
        "inline": set(full) - {"kind"},
        "torchrun": {"slurm"},
        "slurm": {"node_rank", "rendezvous", "oversubscribe"},
    }
    assert set(full) - set(launch) == left_out[kind]


HEAVY = ("torch", "numpy", "pyarrow", "matplotlib", "transformers", "tokenizers", "datasets")


def loaded_by(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    return literal_eval(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)


def test_nothing_heavy_is_imported_before_the_keys_are_checked():
    """`leviathan VERB` imports the verb's module, composes its configuration and only then runs it."""
    modules = sorted({verb.module or name for name, verb in VERBS.items()})
    statements = [f"import launch.verbs.{module}" for module in modules]
    refused = "from launch.cli import main; assert main(['train', 'model.hiden_size=3']) == 2"
    assert loaded_by("\n".join([*statements, refused])) == []
    assert "torch" in loaded_by("import launch.agent"), "the check can fail"
