"""Filter a corpus: the training documents of every source, before they are tokenised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config import plain
from core.errors import ConfigError, DataError, printable
from core.files import sha256_text
from data.filter.audit.outputs import SCORES, keep_audit, write_audit_of, write_scores
from data.filter.config import FilterRules, InputConfig, decisive_settings, under
from data.filter.input.pictures import pictures_of
from data.filter.input.readers import MalformedRecord, clean_records
from data.filter.input.records import Reason, Record
from data.filter.pipeline import FORMAT, Filter, FilterJob, file_digest
from data.filter.score.factory import Models, make_scorer
from data.filter.store import OneWorker
from data.images.config import BadMedia, ImagesConfig
from data.images.media import BadMediaError
from data.sources import BAD_MEDIA, Document, Source
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourcePart:
    """The training documents of a source as records. Their domain is the source's name. `content`: its fingerprint.
    `images`: how pictures are read, None for a source of text.
    """

    source: Source
    content: str
    images: ImagesConfig | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def fingerprint(self) -> str:
        return sha256_text(self.source.name, self.content)

    @property
    def keys(self) -> dict[str, str | None]:
        if self.images is None:
            return {}
        return {f"data.images.{key}": json.dumps(value) for key, value in plain(self.images).items()}

    def records(self) -> Iterator[Record | MalformedRecord]:
        for name, document in _named(self.source):
            if document.held_out or document.dropped is not None:
                continue
            try:
                pictures = () if self.images is None else pictures_of(document.parts or (), self.images)
            except BadMediaError as error:
                if self.images is not None and self.images.on_bad is BadMedia.fail:
                    key, advice = f"data.sources.{self.name}", ["data.images.on_bad=drop"]
                    raise ConfigError(key, document.name, str(error), advice) from None
                yield MalformedRecord(name, name, printable(str(error)))
            else:
                yield Record(name, self.name, name, document.text, pictures=pictures)


class FilteredSource:
    """A source without the training documents that the filter dropped."""

    def __init__(self, number: int, part: SourcePart, done: Filter) -> None:
        """`number`: that of the part in the job."""
        self.number, self.part, self.source, self.done, self.name = number, part, part.source, done, part.name

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
            if reason is None:
                yield replace(document, name=name)
            else:
                # no record of a source is malformed but for its pictures
                dropped = BAD_MEDIA if reason == Reason.malformed.name else f"by_filter_{reason}"
                yield Document("", False, dropped)
        if next(reasons, end) != end:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"the documents of {self.name} changed while they were filtered: run again")

    def _reasons(self) -> Iterator[str | None]:
        """Yield the reason for which each training document of this source is dropped, in order; None: it is kept."""
        for shard in self.done.shards_of(self.number):
            table = self.done.decided.read(shard, ["kept", "reason"])
            for kept, reason in zip(table["kept"].to_pylist(), table["reason"].to_pylist(), strict=True):
                yield None if kept else reason


def _named(source: Source) -> Iterator[tuple[str, Document]]:
    for ordinal, document in enumerate(source.documents()):
        yield f"{source.name}:{ordinal if document.name is None else document.name}", document


@contextmanager
def _under_filter() -> Iterator[None]:
    """Prepend `data.filter.` to the key of a `ConfigError`, unless it is that of a source. A record of the input is one
    of a source.
    """
    try:
        yield
    except ConfigError as error:
        if error.key == "input":
            advice = [f"data.filter.{one}" for one in error.legal]
            raise ConfigError("data.sources", error.value, error.reason, advice) from None
        raise (error if error.key.startswith("data.") else error.under("data.filter")) from None


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
    contents = (text for part in parts for text in (part.content, *part.keys.values()))
    key = sha256_text(rules_fingerprint(rules), tokenizer.fingerprint, *map(str, contents))
    directory = cache / "filter" / key[:32]
    with _under_filter():
        rules.scorer.check_documents("scorer")
        with under("scorer"):
            scorer = make_scorer(rules.scorer, models, cache, rules.seed)
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
            patience_s=math.inf,
            clean=clean_records(rules.select.clean, InputConfig(input="")) if rules.select.clean else (),
        )
        done = Filter(job)
        done.run()
    write_scores(done, directory / SCORES)
    write_audit_of(done, directory, "data.filter")
    return [FilteredSource(number, part, done) for number, part in enumerate(parts)]


def rules_fingerprint(rules: FilterRules) -> str:
    """Hash the rules, the files that they name and the format of stages. A model is hashed by its name only, because
    no model is opened just to check the cache.
    """
    files = [*rules.contamination.sets.values(), *([rules.select.clean] if rules.select.clean else [])]
    files += rules.scorer.rubric_files()
    return sha256_text(str(FORMAT), json.dumps(decisive_settings(rules)), *map(file_digest, files))


def describe_filter(sources: Sequence[Source], directory: Path) -> dict[str, Any]:
    """Copy the audit to `directory`, which will hold the tokens. Return the filter's entry for the manifest there."""
    done = next(source.done for source in sources if isinstance(source, FilteredSource))
    keep_audit(done.job.directory.parent, directory, SCORES)
    return {"scorer": done.job.scorer.name, "fingerprint": done.decided.key, "keep": done.rules.keep}
