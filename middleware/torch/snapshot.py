"""Snapshots of torch's device memory: on demand (the probe's `memory_snapshot`), and on OOM.

A snapshot is the pickle that https://pytorch.org/memory_viz opens: every live block, and where
`STAGESCOPE_MEMORY_HISTORY=1` turned the history on, who allocated it and what came and went before.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from stagescope import settings
from stagescope.files import replace_file
from stagescope.middleware.probe.server import Connection, Refused
from stagescope.middleware.recording.guard import guarded, say_once
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.torch.device_events import in_use

HISTORY_ENTRIES = 100_000
"""torch's own default is no bound, and stacks in C++, which take minutes to write."""
MAX_BYTES = 64 << 20
SPARE_BYTES = 256 << 20
"""What a snapshot leaves free in its file system."""
MOST_KEPT, NOTICES_KEPT = 4, 64
"""Snapshots and notices in a spool; the oldest go."""
REST_NS = 60_000_000_000
"""Between two snapshots on OOM."""
SNAPSHOTS = "snapshots"
NOTICES = "notices"


def answer(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Write a snapshot and name it; Refused where no device is in use, or there is no room."""
    torch = sys.modules.get("torch")
    found = in_use(torch) if torch is not None else None
    if found is None:
        raise Refused("torch uses no device in this process, so there is no snapshot to take")
    kind, namespace = found
    read = getattr(namespace.memory, "_snapshot", None)
    if read is None:
        raise Refused(f"torch gives no memory snapshots of {kind} devices")
    at_ns = asker.recorder.clock()
    try:
        path, left_out = write_snapshot(read(), _spool(asker.recorder), at_ns)
    except (OSError, RuntimeError) as problem:  # An allocator that was plugged in has none.
        raise Refused(f"no memory snapshot: {problem}") from None
    return {"path": str(path), "at_ns": at_ns, "bytes": path.stat().st_size, "left_out": left_out}


def write_snapshot(
    snapshot: Mapping[str, Any], spool: Path, at_ns: int, *, max_bytes: int = MAX_BYTES
) -> tuple[Path, str]:
    """Write *snapshot* into the spool; give the file, and what had to be left out of it.

    Beyond *max_bytes* the history goes first, then the stacks of the blocks. Raises Refused where
    it is too large even so, or the file system too full.
    """
    folder = spool / SNAPSHOTS
    folder.mkdir(mode=0o700, exist_ok=True)
    most = min(max_bytes, shutil.disk_usage(folder).free - SPARE_BYTES)
    path = folder / f"{os.getpid()}-{at_ns}.pickle"
    for left_out, smaller in _SMALLER:
        if (content := _pickled(smaller(snapshot), most)) is not None:
            _write(path, content)
            _forget_old(folder, "*.pickle", MOST_KEPT)
            return path, left_out
    raise Refused(f"no room for a memory snapshot in {folder}: it would take over {most:,} bytes")


def _whole(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    return snapshot


def _without_history(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**snapshot, "device_traces": [[] for _ in snapshot.get("device_traces", ())]}


def _without_stacks(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    segments = []
    for segment in snapshot.get("segments", ()):
        blocks = [{**block, "frames": []} for block in segment.get("blocks", ())]
        segments.append({**segment, "frames": [], "blocks": blocks})
    return {**_without_history(snapshot), "segments": segments}


_SMALLER: tuple[tuple[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]], ...] = (
    ("", _whole),
    ("history", _without_history),
    ("history and stacks", _without_stacks),
)


class _Bounded(io.BytesIO):
    """Takes so many bytes and no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, block: Any) -> int:
        """Raises OverflowError where it is too much."""
        if self.tell() + len(block) > self._most:
            raise OverflowError
        return super().write(block)


def _pickled(snapshot: Mapping[str, Any], most: int) -> memoryview | None:
    into = _Bounded(most)
    try:
        pickle.dump(snapshot, into)
    except OverflowError:
        return None
    return into.getbuffer()


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all."""
    try:
        replace_file(path, content)
    except OSError as problem:
        raise Refused(f"{path} could not be written: {problem.strerror}") from None


def _forget_old(folder: Path, pattern: str, most: int) -> None:
    def age(path: Path) -> int:
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:  # Another process keeps order here too.
            return 0

    for path in sorted(folder.glob(pattern), key=age)[:-most]:
        path.unlink(missing_ok=True)


class MemoryWatch:
    """Writes a snapshot where a device has no memory left, and puts a notice for the agent.

    torch calls it in the thread that asked for the memory, its allocator's lock not held; the
    state is taken there and written by a thread of its own.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]], recorder: Recorder) -> None:
        self._read = read
        self._recorder = recorder
        self._due_ns = 0
        self._lock = Lock()

    def __call__(self, device: int, asked: int, total: int, free: int) -> None:
        """Be told by torch: *asked* bytes were wanted, of *total* that it may have *free* are left."""
        with guarded(self._recorder):
            at_ns = self._recorder.clock()
            if not self._is_due(at_ns):
                return  # It is counted by torch: `num_ooms`.
            notice = {"kind": "oom", "pid": os.getpid(), "at_ns": at_ns, "device": device,
                      "asked_bytes": asked, "total_bytes": total, "free_bytes": free}  # fmt: skip
            # No daemon: a process that ends by this still leaves its snapshot.
            Thread(target=self._put, args=(notice, self._read())).start()

    def _is_due(self, at_ns: int) -> bool:
        with self._lock:
            due = at_ns >= self._due_ns
            if due:
                self._due_ns = at_ns + REST_NS
        return due

    def _put(self, notice: dict[str, Any], snapshot: Mapping[str, Any]) -> None:
        with guarded(self._recorder):
            put_notice(notice, snapshot, _spool(self._recorder))


def put_notice(notice: Mapping[str, Any], snapshot: Mapping[str, Any], spool: Path) -> Path:
    """Write `notices/PID-NS.json`, which names the snapshot, or says why there is none."""
    path = why_none = ""
    try:
        path = str(write_snapshot(snapshot, spool, notice["at_ns"])[0])
    except (Refused, OSError) as problem:
        why_none = str(problem)
    folder = spool / NOTICES
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / f"{notice['pid']}-{notice['at_ns']}.json"
    _write(file, json.dumps({**notice, "path": path, "why_no_path": why_none}).encode())
    _forget_old(folder, "*.json", NOTICES_KEPT)
    return file


_watched: dict[int, object] = {}
"""By pid, for a forked child's torch is another one: the torch that is watched."""
_lock = Lock()


def watch_memory(torch: Any, kind: str, namespace: Any, recorder: Recorder) -> None:
    """Begin to watch for running out of memory, once; with history where it is asked for.

    Only where a device is in use already: before, there is no allocator to watch.
    """
    attach = getattr(torch._C, f"_{kind}_attach_out_of_memory_observer", None)
    read = getattr(namespace.memory, "_snapshot", None)
    with _lock:
        if _watched.get(os.getpid()) is torch:
            return
        _watched[os.getpid()] = torch
    try:
        if settings.MEMORY_HISTORY.on():
            _keep_history(kind, namespace)
        if attach is not None and read is not None:
            attach(MemoryWatch(read, recorder))
    except RuntimeError as refusal:  # An allocator that was plugged in can do neither.
        say_once(f"running out of device memory is not watched: {refusal}")


def _keep_history(kind: str, namespace: Any) -> None:
    begin = getattr(namespace.memory, "_record_memory_history", None)
    if begin is None:
        say_once(f"{settings.MEMORY_HISTORY.name}: torch keeps no history of {kind} memory")
        return
    begin(enabled="all", context="alloc", stacks="python", max_entries=HISTORY_ENTRIES)


def _fresh_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global _lock
    _lock = Lock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)


def _spool(recorder: Recorder) -> Path:
    if recorder.path is None:
        raise Refused("this process writes no recorder file, so it has no spool for a snapshot")
    return recorder.path.parent
