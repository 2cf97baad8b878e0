"""Curate image-caption pairs: two passes over files, with a sum over all processes between them.

The first pass counts the matches of each entry. The second matches again, keeps or drops each pair and writes the kept
ones, a parquet file for each file of the input. Each file is read by one process. Nothing is stored between the passes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError
from core.files import new_directory, read_json, write_json
from data.curation.audit import write_audit_files
from data.curation.balance import is_kept, keep_probabilities
from data.curation.config import CurationRules
from data.curation.matching import EntryMatcher, Metadata
from data.curation.tally import Fate, FileTally
from data.files import UnreadableFile
from data.filter.audit.outputs import write_documents
from data.filter.store import Workers, barrier, local_items, writing
from data.images.parts import PartsConfig, PartsDocument
from data.images.readers import read_documents

KEPT = "kept"
"""Folder of the kept pairs."""


@dataclass(frozen=True)
class Curation:
    """The settings of a curation and the processes that share it."""

    files: Sequence[tuple[str, Path]]
    """Name and path of each file of the input, the same list on all processes."""
    columns: PartsConfig
    metadata: Metadata
    rules: CurationRules
    workers: Workers

    def run(self, out: Path) -> dict[str, Any]:
        """Write the kept pairs and the audit into a new directory, which appears when it is complete. Return the audit
        on the first process, and an empty one on the others.

        Raises `ConfigError` if no caption matches, and `DataError` if a file changes between the passes.
        """
        matcher, size = EntryMatcher(self.metadata.entries), len(self.metadata.entries)
        with _shared_directory(out, self.workers) as scratch:
            before, after = np.zeros(size, np.int64), np.zeros(size, np.int64)
            tallies = {}
            with barrier(self.workers):
                for number in self._numbers():
                    tallies[number] = FileTally(*self.files[number])
                    for _, entries in self._pairs(tallies[number], matcher):
                        before[entries] += 1
            before = self.workers.sum(before)
            if not before.any():
                reason = f"no caption of the {len(self.files):,} files matches one of its {size:,} entries"
                raise ConfigError("metadata", None, f"{reason}; matching is case-sensitive")
            probabilities = keep_probabilities(before, self.rules.t)
            with barrier(self.workers):
                for number, first in tallies.items():
                    kept = self._kept(first, matcher, probabilities, after)
                    write_documents(scratch / KEPT / f"{number:05d}.parquet", kept)
                with writing(scratch):
                    write_json(scratch / f"{self.workers.rank}.json", [one.plain() for one in tallies.values()])
            after = self.workers.sum(after)
            with barrier(self.workers):
                if self.workers.rank:
                    return {}
                return write_audit_files(scratch, self.metadata, self.rules, before, after, self._tallied(scratch))

    def _tallied(self, scratch: Path) -> list[dict[str, Any]]:
        """Return the tallies that all processes have written, in the order of the files, and remove them."""
        found: list[dict[str, Any]] = [{}] * len(self.files)
        for rank in range(self.workers.size):
            path = scratch / f"{rank}.json"
            found[rank :: self.workers.size] = read_json(path)
            path.unlink()
        return found

    def _numbers(self) -> list[int]:
        return local_items(range(len(self.files)), self.workers)

    def _kept(
        self, first: FileTally, matcher: EntryMatcher, probabilities: NDArray[np.float64], after: NDArray[np.int64]
    ) -> Iterator[PartsDocument]:
        """Yield the kept pairs of a file, and count them in `after` and in the tally of the first pass."""
        again, fates = FileTally(first.name, first.path), Counter[str]()
        for document, entries in self._pairs(again, matcher):
            stays = is_kept(document.digest, probabilities[entries].tolist(), self.rules.seed)
            fates[(Fate.kept if stays else Fate.balanced).name] += 1
            if stays:
                after[entries] += 1
                yield document
        if again.digest != first.digest:
            raise DataError(f"{first.name} changed while it was curated: run again")
        first.fates += fates

    def _pairs(self, tally: FileTally, matcher: EntryMatcher) -> Iterator[tuple[PartsDocument, list[int]]]:
        """Yield the pairs of a file that match, with the numbers of their entries. Count the other records."""
        digest = hashlib.sha256()
        for document in _documents(tally, self.columns):
            caption = document.text
            if all(isinstance(part, str) for part in document.parts):
                fate = Fate.no_picture
            elif not caption.strip():
                fate = Fate.empty
            elif len(caption) > self.rules.max_characters:
                fate = Fate.huge
            elif entries := matcher.match(caption):
                digest.update(f"{document.digest}:{entries}\n".encode())
                yield document, entries
                continue
            else:
                fate = Fate.unmatched
            tally.fates[fate.name] += 1
        tally.digest = digest.hexdigest()


def _documents(tally: FileTally, columns: PartsConfig) -> Iterator[PartsDocument]:
    """Yield the documents of a file, up to its damage if it is damaged. Note what cannot be read."""
    try:
        for document in read_documents(tally.path, columns, name=tally.name):
            if isinstance(document, PartsDocument):
                yield document
                continue
            tally.add_malformed(document)
    except UnreadableFile as error:
        tally.damaged = True
        tally.problems.append(f"{tally.name}: is damaged, and what follows is lost: {error}")
    except ConfigError as error:
        raise error.under("parts") from None


@contextmanager
def _shared_directory(out: Path, workers: Workers) -> Iterator[Path]:
    """Yield one scratch directory on all processes. The first makes it, and turns it into `out` at the end."""
    first = int(workers.sum(np.array([0 if workers.rank else os.getpid()]))[0])
    scratch = out.with_name(f".{out.name}.{first}.tmp")
    with nullcontext() if workers.rank else new_directory(out, exclusive=True):
        with barrier(workers), writing(scratch):
            if workers.rank == 0:
                (scratch / KEPT).mkdir()
        yield scratch
