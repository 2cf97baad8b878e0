"""Libraries get their settings before they are loaded, unless the environment decides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from core.library_settings import SETTINGS, set_for_libraries, shown

DEFAULTS = {one.variable: one.value for one in SETTINGS}


@pytest.mark.parametrize(
    "given, left",
    [
        ({}, {}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": None}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, {"PYTORCH_ALLOC_CONF": None}),
        ({"NCCL_LAUNCH_ORDER_IMPLICIT": "0"}, {"NCCL_LAUNCH_ORDER_IMPLICIT": "0"}),
    ],
)
def test_a_variable_is_set_unless_the_environment_decides(monkeypatch, given, left):
    monkeypatch.setattr(os, "environ", dict(given))
    set_for_libraries()
    assert {name: os.environ.get(name) for name in DEFAULTS} == DEFAULTS | left
    for one in SETTINGS:
        name, _, value = shown(one).partition("=")
        assert os.environ[name] == value


def test_a_process_sets_them_before_torch_is_imported():
    check = (
        "import os, sys; print('torch' in sys.modules, *(name for name in {names} if name in os.environ)); sys.exit()"
    )
    command = f"import os; from core.process import run_process\ndef main(_):\n    {check.format(names=list(DEFAULTS))}\nrun_process(main, [])"
    clean = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    found = subprocess.run([sys.executable, "-c", command], env=clean, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["False", *DEFAULTS], found.stderr
