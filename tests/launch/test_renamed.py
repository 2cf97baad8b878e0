"""Old keys and values are rejected with the new name, wherever they occur."""

from __future__ import annotations

import dataclasses

import pytest

from core.config import build, load
from core.errors import ConfigError, RenamedKeyError
from core.renamed import FIELDS, UNTYPED, VALUES
from data.config import DataConfig
from data.filter.config import ScorerConfig
from hparam.scale import Scale
from launch.config import SlurmConfig
from launch.filter.config import AblateConfig
from launch.verbs.evaluate import EvaluateConfig
from model.config import LayerConfig, ModelConfig, RopeScaling, RouterConfig
from parallel.deepspeed.config import ZeroConfig
from parallel.layout import ParallelConfig
from precision.config import Backend, PrecisionConfig
from train.config import EvaluationConfig, PhaseConfig, TrainConfig, TrainingConfig
from train.run_directory import write_config

CONFIGS = (ModelConfig, LayerConfig, RouterConfig, RopeScaling, Scale, TrainingConfig, PhaseConfig, EvaluationConfig)
OTHERS = (EvaluateConfig, AblateConfig, DataConfig, ScorerConfig, ParallelConfig, ZeroConfig, PrecisionConfig)
CLASSES = {cls.__name__: cls for cls in (*CONFIGS, *OTHERS, SlurmConfig, Backend)}
RENAMED = [(name, old, new) for name, fields in FIELDS.items() for old, new in fields.items()]


@pytest.mark.parametrize("name, old, new", RENAMED)
def test_an_old_field_is_rejected_with_the_new_one(name, old, new):
    fields = {field.name for field in dataclasses.fields(CLASSES[name])}
    assert new in fields and old not in fields
    with pytest.raises(RenamedKeyError, match=rf"^here\.{old}: was renamed to here\.{new}$"):
        build(CLASSES[name], {old: 1}, "here")
    with pytest.raises(ConfigError) as control:
        build(CLASSES[name], {f"{old}_": 1}, "here")
    assert "no such key" in str(control.value), "a typing error is not an old key"


def test_the_tables_name_classes_and_members():
    assert {*FIELDS, *VALUES, *UNTYPED.values()} == set(CLASSES)
    for name, members in VALUES.items():
        known = set(CLASSES[name].__members__)
        assert set(members.values()) <= known and not set(members) & known


def test_an_old_run_directory_is_one_line(tmp_path, refused):
    config = tmp_path / "config.yaml"
    write_config(config, load("train", TrainConfig, []))
    assert "older format" not in refused("evaluate", str(tmp_path), code=1), "control"
    config.write_text(config.read_text().replace("  seq_len:", "  context:"))
    renamed = "training.context: was renamed to training.seq_len"
    assert refused("evaluate", str(tmp_path)) == f"run={tmp_path}: config.yaml is of an older format: {renamed}"
