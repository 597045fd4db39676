"""Which fields of a record are columns of a run folder: they say there what they hold, once."""

from __future__ import annotations

HOST_CLOCK = "ns on the monotonic clock of the server's host"
RUN_CLOCKS = "ns on the monotonic clock of the host in `run.json` (client) or of `boot_id` (server)"


def column(text: str, *, small: bool = False) -> dict[str, object]:
    """Return the metadata of a field that is a column, described by *text*; *small* fits 32 bits.

    Rows, Arrow schema, the columns' descriptions in Parquet files and docs/run-folder.md follow
    from it (runfolder/schema.py).
    """
    return {"column": text, "small": small}
