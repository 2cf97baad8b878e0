from __future__ import annotations

from pathlib import Path

import pytest

from core.memory import available_memory

GB = 1 << 30
UNLIMITED = 9223372036854771712  # how version 1 says that there is no limit


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    files = {"proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {8 << 20} kB\n", "proc/self/cgroup": cgroup, **files}
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "no_group": ("1:cpu:/", {}, 8),
    "version_2": ("0::/a", {f"{V2}/a/memory.max": 3 * GB, f"{V2}/a/memory.current": GB}, 2),
    "unlimited": ("0::/a", {f"{V2}/a/memory.max": "max", f"{V2}/a/memory.current": GB}, 8),
    "around_it": (
        "0::/a/b",
        {f"{V2}/a/memory.max": 3 * GB, f"{V2}/a/memory.current": GB}
        | {f"{V2}/a/b/memory.max": "max", f"{V2}/a/b/memory.current": GB},
        2,
    ),
    "a_container": ("0::/../x", {f"{V2}/memory.max": 5 * GB, f"{V2}/memory.current": GB}, 4),
    "file_cache": (
        "0::/",
        {f"{V2}/memory.max": 3 * GB, f"{V2}/memory.current": 3 * GB, f"{V2}/memory.stat": f"inactive_file {GB}"},
        1,
    ),
    "used_up": ("0::/", {f"{V2}/memory.max": 3 * GB, f"{V2}/memory.current": 4 * GB}, 0),
    "version_1": (
        "5:cpu:/a\n4:memory:/a",
        {f"{V1}/a/memory.limit_in_bytes": 3 * GB, f"{V1}/a/memory.usage_in_bytes": GB}
        | {f"{V1}/memory.limit_in_bytes": UNLIMITED, f"{V1}/memory.usage_in_bytes": GB},
        2,
    ),
}


@pytest.mark.parametrize("cgroup, files, gigabytes", CASES.values(), ids=CASES.keys())
def test_the_tightest_limit_counts(tmp_path, cgroup, files, gigabytes):
    assert available_memory(machine(tmp_path, cgroup, files)) == gigabytes * GB


def test_this_machine_has_some():
    assert available_memory() > 0
