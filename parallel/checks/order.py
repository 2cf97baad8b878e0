"""Check that parameters are gathered ahead of where a rank stops to wait for its device.

Under expert parallelism each MoE layer copies the numbers of its tokens to the host. The device's queue is empty then,
so a gather that is issued after it overlaps nothing. The gathers of the next layer and its experts must come before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from parallel.checks.recorder import Issued

_LAYER = re.compile(r"FSDP::root_pre_forward|FSDP::pre_(forward|backward) \(layers\.(\d+)\)")
_GATHER = re.compile(r"FSDP::all_gather \(layers\.(\d+)((?:\.\w+)*)\)")
_COPY = re.compile(_GATHER.pattern.replace("all_gather", "all_gather_copy_out"))


def late_gathers(issued: Sequence[Issued]) -> list[str]:
    """Return the gathers that one rank issued after the synchronisation of the layer before; empty if none is late."""
    passes = [(place, match[1] or "", int(match[2] or 0)) for place, match in _matches(_LAYER, issued)]
    gathers, copies = _matches(_GATHER, issued), _matches(_COPY, issued)
    found: list[str] = []
    for (begin, direction, layer), (end, after, following) in pairwise(passes):
        if after != direction or following - layer != (1 if direction == "forward" else -1):
            continue
        waits = [place for place in range(begin, end) if issued[place].operation == "synchronise"]
        if not waits:
            continue
        until = next((place for place, *_ in passes if place > end), len(issued))
        for place, gather in gathers:
            used = next((use for use, copy in copies if use > place and copy.groups() == gather.groups()), until)
            if waits[0] < place < used < until and int(gather[1]) == following:
                late = f"{direction}: layer {following}{gather[2]} is gathered after layer {layer} has stopped the host"
                found += [late] * (late not in found)
    return found


def _matches(pattern: re.Pattern[str], issued: Sequence[Issued]) -> list[tuple[int, re.Match[str]]]:
    found = ((place, pattern.fullmatch(one.label)) for place, one in enumerate(issued) if one.operation == "begin")
    return [(place, match) for place, match in found if match is not None]
