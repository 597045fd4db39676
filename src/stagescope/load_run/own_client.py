"""A run whose requests a client of one's own sent: its file joined with the server's side."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from stagescope.errors import StagescopeError
from stagescope.identity import boot_id, check_run_id
from stagescope.load_run.client_file import ClientFile, read_client_file
from stagescope.load_run.collect import collect_server_side
from stagescope.load_run.locate import AgentLocation, locate
from stagescope.load_run.plan import RunFolder
from stagescope.load_run.run import RUNS, completed, free_folder, keep_client, make_folder
from stagescope.loadgen.health import timeouts
from stagescope.loadgen.target import target
from stagescope.runfolder.run import Plan, Run, this_host
from stagescope.runfolder.schema import SERVER


def join(
    file: Path, run_id: str, named: AgentLocation, *, url: str = "", out: Path | None = None
) -> RunFolder:
    """Join the requests in *file* with what the agent has of run *run_id*, as a run folder.

    *url* is what was loaded: its port tells the server's spool. The run is closed at the agent.
    Raises UsageError for a file, an id or a URL that is not usable.
    """
    check_run_id(run_id)
    aim = target(url) if url else None
    sent = read_client_file(file)
    folder = free_folder(out or RUNS / run_id)
    run = _run(run_id, file, sent, aim.shown_url if aim else "")
    make_folder(folder)
    keep_client(folder, run, sent)
    place = locate(named, aim)
    collected = collect_server_side(folder, run_id, sent, place, None)
    with suppress(StagescopeError):  # Nothing is lost: it keeps the run for a day at most.
        if client := place.client():
            client.close_run(run_id)
    if sent.monotonic and not _is_one_clock(folder, sent):
        run = replace(run, host=replace(run.host, boot_id=""))
        collected.problems.append(
            f"the times in {file} are not on the monotonic clock of the server's host, so network "
            "is not split"
        )
    return completed(folder, run, collected)


def _run(run_id: str, file: Path, sent: ClientFile, url: str) -> Run:
    first_ns = sent.rows[0]["intended_ns"]
    measured = [row for row in sent.rows if row["phase"] == "measure"] or sent.rows
    began_ns, over_ns = measured[0]["intended_ns"], measured[-1]["intended_ns"]
    if over_ns == began_ns:  # all at once
        over_ns = max(row["last_byte_ns"] for row in measured)
    host = this_host()
    since_boot_ns = time.time_ns() - time.monotonic_ns()
    return Run(
        run_id=run_id,
        plan=Plan(url=url, method=""),
        host=host if sent.monotonic else replace(host, boot_id=""),
        started_wall_ns=first_ns + since_boot_ns if sent.monotonic else first_ns,
        started_ns=first_ns,
        measured_s=(over_ns - began_ns) / 1e9,
        client_file=file.name,
        invalid_reasons=tuple(timeouts([row["error"] for row in measured])),
        driver={"planned": float(len(sent.rows))},
    )


def _is_one_clock(folder: Path, sent: ClientFile) -> bool:
    """Return whether every server record of this host lies within its request's times.

    A monotonic time of another host, or of before a reboot, looks like one of this host's.
    """
    import pyarrow.parquet as pq

    here = boot_id()
    times = {row["trace_id"]: (row["sent_ns"], row["last_byte_ns"]) for row in sent.rows}
    columns = ["trace_id", "start_ns", "boot_id"]
    starts = [
        (times[row["trace_id"]], row["start_ns"])
        for row in pq.read_table(folder / SERVER.file_name, columns=columns).to_pylist()
        if row["boot_id"] == here and row["trace_id"] in times
    ]
    return bool(starts) and all(since <= at <= until for (since, until), at in starts)
