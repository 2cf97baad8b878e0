"""The columns of the tables that the stages store."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from data.filter.input.records import RecordPicture
from data.filter.screen.duplicates import PLACES

PICTURES, THUMBNAILS = "pictures", "thumbnails"
"""Columns of the shards whose records have pictures."""
OF_PICTURES = tuple(one.name for one in fields(RecordPicture) if one.name != "thumbnail")


def make_table(**columns: Any) -> Any:
    """Make a table. Columns that are all null keep their type, so that all shards have the same schema."""
    import pyarrow

    strings = ("id", "domain", "source", "text", "problem", "reason", "detail", "why", "of")
    types = dict.fromkeys(strings, pyarrow.string())
    types |= {"answer_start": pyarrow.int32(), "raw": pyarrow.binary()}
    types |= {"exact": pyarrow.binary(16), "near": pyarrow.binary(4 * PLACES)}
    types |= {PICTURES: picture_type(), THUMBNAILS: pyarrow.list_(pyarrow.binary())}
    return pyarrow.table({name: pyarrow.array(values, types.get(name)) for name, values in columns.items()})


def picture_type() -> Any:
    """Return the type of `PICTURES`: a list of structs."""
    import pyarrow

    types = {
        "name": pyarrow.string(),
        "sha256": pyarrow.string(),
        "hash": pyarrow.uint64(),
        "colours": pyarrow.binary(),
    }
    return pyarrow.list_(pyarrow.struct([(name, types.get(name, pyarrow.int64())) for name in OF_PICTURES]))
