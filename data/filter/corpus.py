"""Filter a corpus: the training documents of every source, before they are tokenised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DataError
from core.files import sha256_text
from data.filter.audit.outputs import SCORES, keep_audit, write_audit_of, write_scores
from data.filter.config import FilterRules, InputConfig, decisive_settings, under
from data.filter.input.readers import MalformedRecord, clean_records
from data.filter.input.records import Record
from data.filter.pipeline import FORMAT, Filter, FilterJob, file_digest
from data.filter.score.factory import Models, make_scorer
from data.filter.store import OneWorker
from data.sources import Document, Source
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourcePart:
    """The training documents of a source as records. Their domain is the source's name. `content`: its fingerprint."""

    source: Source
    content: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def fingerprint(self) -> str:
        return sha256_text(self.source.name, self.content)

    @property
    def keys(self) -> dict[str, str | None]:
        return {}

    def records(self) -> Iterator[Record | MalformedRecord]:
        for name, document in _named(self.source):
            if document.parts is not None:
                reason = f"would see only the text of the documents with pictures in sources.{self.source.name}"
                raise ConfigError("data.filter", None, reason, ["null"])
            if not document.held_out and document.dropped is None:
                yield Record(name, self.source.name, name, document.text)


class FilteredSource:
    """A source without the training documents that the filter dropped."""

    def __init__(self, part: SourcePart, done: Filter) -> None:
        self.part, self.source, self.done, self.name = part, part.source, done, part.name

    def fingerprint(self) -> str:
        return sha256_text(self.part.content, self.done.decided.key)

    def documents(self) -> Iterator[Document]:
        """Yield the source's documents. Those that the filter dropped come without text, only to be counted.

        Raises `DataError` if the number of training documents has changed since the source was filtered.
        """
        end = "end"  # no reason has this name
        reasons = self._reasons()
        for name, document in _named(self.source):
            if document.held_out or document.dropped is not None:
                yield document
                continue
            reason = next(reasons, end)
            if reason == end:
                raise self._changed()
            yield replace(document, name=name) if reason is None else Document("", False, f"by_filter_{reason}")
        if next(reasons, end) != end:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"the documents of {self.name} changed while they were filtered: run again")

    def _reasons(self) -> Iterator[str | None]:
        """Yield the reason for which each training document of this source is dropped, in order; None: it is kept."""
        for shard in self.done.records.shards:
            if self.done.records.read(shard, ["domain"])["domain"][0].as_py() == self.name:
                table = self.done.decided.read(shard, ["kept", "reason"])
                for kept, reason in zip(table["kept"].to_pylist(), table["reason"].to_pylist(), strict=True):
                    yield None if kept else reason


def _named(source: Source) -> Iterator[tuple[str, Document]]:
    for ordinal, document in enumerate(source.documents()):
        yield f"{source.name}:{ordinal if document.name is None else document.name}", document


def filter_sources(
    parts: Sequence[SourcePart],
    rules: FilterRules,
    tokenizer: Tokenizer,
    cache: Path,
    report: Callable[[str], None],
    models: Models | None,
) -> list[Source]:
    """Filter the sources. Stages are stored in the cache, so a killed filter resumes."""
    unknown = set(rules.select.domains) | set(rules.select.protect)
    for name in sorted(unknown - {part.name for part in parts}):
        raise ConfigError("data.filter.select", name, "no such source", [part.name for part in parts])
    key = sha256_text(rules_fingerprint(rules), tokenizer.fingerprint, *(part.content for part in parts))
    directory = cache / "filter" / key[:32]
    with under("data.filter"):
        with under("scorer"):
            scorer = make_scorer(rules.scorer, models, cache / "answers", rules.seed)
        job = FilterJob(
            parts=parts,
            rules=rules,
            scorer=scorer,
            directory=directory / "stages",
            workers=OneWorker(),
            report=report,
            count_tokens=lambda texts: [len(ids) for ids in tokenizer.encode(texts)],
            tokenizer=tokenizer.fingerprint,
            models=models,
            clean=clean_records(rules.select.clean, InputConfig(input="")) if rules.select.clean else (),
        )
        done = Filter(job)
        done.run()
    write_scores(done, directory / SCORES)
    write_audit_of(done, directory, "data.filter")
    return [FilteredSource(part, done) for part in parts]


def rules_fingerprint(rules: FilterRules) -> str:
    """Hash the rules, the files that they name and the format of stages. A model is hashed by its name only, because
    no model is opened just to check the cache.
    """
    files = [*rules.contamination.sets.values(), *([rules.select.clean] if rules.select.clean else [])]
    return sha256_text(str(FORMAT), json.dumps(decisive_settings(rules)), *map(file_digest, files))


def describe_filter(sources: Sequence[Source], directory: Path) -> dict[str, Any]:
    """Copy the audit to `directory`, which will hold the tokens. Return the filter's entry for the manifest there."""
    done = next(source.done for source in sources if isinstance(source, FilteredSource))
    keep_audit(done.job.directory.parent, directory, SCORES)
    return {"scorer": done.job.scorer.name, "fingerprint": done.decided.key, "keep": done.rules.keep}
