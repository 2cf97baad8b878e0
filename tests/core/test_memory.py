from __future__ import annotations

from pathlib import Path

import pytest

from core.memory import available_memory

GB = 1 << 30
UNLIMITED = 9223372036854771712  # the value for "no limit" in cgroup version 1


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    files = {"proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {8 << 20} kB\n", "proc/self/cgroup": cgroup, **files}
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def version_2(group: str, limit: object, used: int = GB) -> dict[str, object]:
    return {f"{V2}/{group}/memory.max": limit, f"{V2}/{group}/memory.current": used}


def version_1(group: str, limit: int, used: int = GB) -> dict[str, object]:
    return {f"{V1}/{group}/memory.limit_in_bytes": limit, f"{V1}/{group}/memory.usage_in_bytes": used}


CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "no_group": ("1:cpu:/", {}, 8),
    "version_2": ("0::/a", version_2("a", 3 * GB), 2),
    "unlimited": ("0::/a", version_2("a", "max"), 8),
    "around_it": ("0::/a/b", version_2("a", 3 * GB) | version_2("a/b", "max"), 2),
    "a_container": ("0::/../x", version_2(".", 5 * GB), 4),
    "file_cache": ("0::/", version_2(".", 3 * GB, 3 * GB) | {f"{V2}/memory.stat": f"inactive_file {GB}"}, 1),
    "used_up": ("0::/", version_2(".", 3 * GB, 4 * GB), 0),
    "version_1": ("5:cpu:/a\n4:memory:/a", version_1("a", 3 * GB) | version_1(".", UNLIMITED), 2),
}


@pytest.mark.parametrize("cgroup, files, gigabytes", CASES.values(), ids=CASES.keys())
def test_the_tightest_limit_counts(tmp_path, cgroup, files, gigabytes):
    assert available_memory(machine(tmp_path, cgroup, files)) == gigabytes * GB
