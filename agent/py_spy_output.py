"""What py-spy writes, read: its Chrome trace, its dump, and its errors.

Chrome trace (py-spy 0.4, `src/chrometrace.rs`): `B` and `E` events, one where a thread's stack
changes, `ts` in µs since it began, `tid` Python's ident of the thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from stagescope.agent.stage_labels import RawStack
from stagescope.stacks import Frame


def read_trace(text: bytes, begun_ns: int, period_ns: int, threads: Threads) -> list[RawStack]:
    """Read a Chrome trace that was begun at *begun_ns*. Raises ValueError where it is none."""
    events = json.loads(text) if text.strip() else []
    by_thread: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("ph") in ("B", "E"):
            by_thread.setdefault(int(event["tid"]), []).append(event)
    return [
        RawStack(*threads.get(ident, (0, "")), begun_ns + since, begun_ns + until,
                 max(1, round((until - since) / period_ns)), frames)
        for ident, of_thread in by_thread.items()
        for since, until, frames in _stretches(of_thread)
    ]  # fmt: skip


Threads = Mapping[int, tuple[int, str]]
"""Python's ident of a thread → the system's id, and its name."""


def _stretches(events: list[Mapping[str, Any]]) -> Iterator[tuple[int, int, tuple[Frame, ...]]]:
    """Give (from, until, frames) of one thread's *events*; times in ns."""
    frames: list[Frame] = []
    since = 0
    for at, changes in groupby(events, key=lambda event: int(event["ts"]) * 1000):
        if frames and at > since:
            yield since, at, tuple(frames)
        for change in changes:
            if change["ph"] == "B":
                where = change.get("args", {})
                name, file = str(change["name"]), str(where.get("filename", ""))
                frames.append(Frame(name, file, int(where.get("line") or 0)))
            elif frames:
                frames.pop()
        since = at


def read_dump(text: bytes, at_ns: int) -> list[RawStack]:
    """Read `py-spy dump --json`, taken at *at_ns*. Raises ValueError where it is none."""
    return [
        RawStack(
            int(thread.get("os_thread_id") or 0),
            str(thread.get("thread_name") or ""),
            at_ns,
            at_ns,
            1,
            tuple(
                Frame(str(f["name"]), str(f["filename"]), int(f.get("line") or 0))
                for f in reversed(thread["frames"])
            ),
        )
        for thread in json.loads(text)
    ]


def read_threads(text: bytes) -> Threads:
    """Read from a dump which threads there are; none where it failed."""
    try:
        return {
            int(t["thread_id"]): (int(t.get("os_thread_id") or 0), str(t.get("thread_name") or ""))
            for t in json.loads(text)
        }
    except (ValueError, KeyError):
        return {}


_CAUSES = (
    ("no space left", "there is no room left in {folder}"),
    ("permission", "the system does not let this user read process {pid}"),
    ("operation not permitted", "the system does not let this user read process {pid}"),
    ("find python version", "process {pid} is no Python that py-spy knows"),
    ("find a python interpreter", "process {pid} is no Python that py-spy knows"),
    ("no such process", "process {pid} has ended"),
    ("check that the process is running", "process {pid} has ended"),
)


def why_failed(stderr: str, pid: int, folder: Path) -> str:
    """Say in one sentence why py-spy gave nothing of process *pid*."""
    text = stderr.lower()
    for sign, cause in _CAUSES:
        if sign in text:
            return f"py-spy sampled nothing: {cause.format(pid=pid, folder=folder)}"
    lines = [line for line in stderr.splitlines() if line.startswith("Error")] or [stderr[:200]]
    return f"py-spy sampled nothing of process {pid}: {lines[0].strip() or 'it says not why'}"
