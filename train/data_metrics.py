"""What a run's data looked like between two lines of its log: waiting, labels, padding, sources."""

from __future__ import annotations

from typing import Any

import torch

from data.loader import IGNORED, Batch


class DataMetrics:
    """Counts this rank's rows as they are consumed; `read` tells of them and begins anew.

    The ranks' rows are like samples of the same blend, so rank 0's shares stand for all: no collective is needed.
    """

    def __init__(self, sources: tuple[str, ...], eos_id: int) -> None:
        self.sources, self.eos_id = sources, eos_id
        self.waited_s = 0.0
        self._begin()

    def add(self, batch: Batch, waited_s: float) -> None:
        """`waited_s`: how long the step had to wait for its batch, in seconds."""
        self.waited_s += waited_s
        self._positions += batch.labels_BT.numel()
        self._labelled += int((batch.labels_BT != IGNORED).sum())
        ends = batch.tokens_BT == self.eos_id
        self._padding += int((ends[:, 1:] & ends[:, :-1]).sum())  # a document's end stands once
        self._rows += torch.bincount(batch.sources_B, minlength=len(self.sources))

    def read(self) -> dict[str, Any]:
        """For a line of metrics. `labelled_tokens` and shares are of this rank's rows since the last call."""
        total = max(int(self._rows.sum()), 1)
        shares = {name: round(rows / total, 4) for name, rows in zip(self.sources, self._rows.tolist(), strict=True)}
        line = {
            "data_wait_s": round(self.waited_s, 6),
            "labelled_tokens": self._labelled,
            "padding_share": round(self._padding / max(self._positions, 1), 6),
            "source_shares": shares,
        }
        self._begin()
        return line

    def _begin(self) -> None:
        self.waited_s = 0.0
        self._positions = self._labelled = self._padding = 0
        self._rows = torch.zeros(len(self.sources), dtype=torch.int64)
