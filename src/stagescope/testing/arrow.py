"""Arrow schemas of the run folder's tables, for tests and benchmarks that make run folders."""

from __future__ import annotations

import re

import pyarrow as pa

from stagescope.tables import Table

_SCALARS = {
    "string": pa.string(),
    "int64": pa.int64(),
    "int32": pa.int32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
_LIST = re.compile(r"list<(?:struct<)?(.*?)>?>")


def arrow_type(text: str) -> pa.DataType:
    """Turn a type of `stagescope.tables` into Arrow's."""
    inner = _LIST.fullmatch(text)
    if inner is None:
        return _SCALARS[text]
    fields = [field.split(": ") for field in inner[1].split(", ")]
    if len(fields[0]) == 1:
        return pa.list_(_SCALARS[inner[1]])
    return pa.list_(pa.struct([(name, _SCALARS[kind]) for name, kind in fields]))


def arrow_schema(table: Table) -> pa.Schema:
    """Give the Arrow schema of *table*."""
    return pa.schema([(column.name, arrow_type(column.type)) for column in table.columns])
