"""This process's recorder: opened at first use, one for each spool and service, never inherited."""

from __future__ import annotations

import atexit
import logging
import os
from functools import lru_cache
from pathlib import Path
from threading import RLock, Thread

from stagescope.errors import StagescopeError
from stagescope.middleware.probe.server import Probe, start_probe
from stagescope.middleware.recording import recorder as recorders
from stagescope.middleware.recording.file import RecorderFile, create_recorder_file
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.run_notes import RECORDER, note
from stagescope.recorder.header import service_of
from stagescope.recorder.spool import default_spool

log = logging.getLogger("stagescope")

_open: dict[tuple[Path, str], tuple[Recorder, RecorderFile] | None] = {}
_probes: list[Probe] = []
_lock = RLock()


SERVICE_VARIABLE = "OTEL_SERVICE_NAME"


def default_service() -> str:
    """Return the name that a process's records have where nobody names the service."""
    return os.environ.get(SERVICE_VARIABLE) or "model-server"


def process_recorder(spool: Path | None, service: str) -> Recorder | None:
    """Return this process's recorder for *spool* and *service*; None where there can be none.

    Why there can be none is logged, once; the server is served without.
    """
    key = (spool or default_spool(), service)
    with _lock:
        found = _open.get(key)
        if found and found[0].closed:
            _retire(*found)
        if key not in _open or (found and found[0].closed):
            _open[key] = _create(*key)
        found = _open[key]
    return found[0] if found else None


def _create(spool: Path, service: str) -> tuple[Recorder, RecorderFile] | None:
    try:
        file = create_recorder_file(spool, service)
    except StagescopeError as reason:
        log.warning("stagescope: nothing is recorded in this process: %s", reason)
        return None
    note(RECORDER)
    recorder = Recorder(
        memoryview(file.memory), ring_slots=file.ring_slots, path=file.path, fd=file.fd
    )
    for _ in range(file.swept):
        recorder.count("files_swept")
    if probe := start_probe(file.path, recorder):
        _probes.append(probe)
    return recorder, file


def _retire(recorder: Recorder, file: RecorderFile) -> None:
    """Close a file that somebody deleted or cut off; what is still in flight ends in it."""
    what = "cut off" if recorder.abandoned else "deleted"
    log.warning(
        "stagescope: recorder file %s was %s while it was written; a new one is made, and what no "
        "agent had read is lost", file.path, what,
    )  # fmt: skip
    os.close(file.fd)
    for probe in [probe for probe in _probes if probe.path.stem == file.path.stem]:
        _probes.remove(probe)
        # Its thread is waited for, which must not happen in a request.
        Thread(target=probe.stop, name="stagescope-probe-end", daemon=True).start()


def _stop_probes() -> None:
    while _probes:
        _probes.pop().stop()


def _forget_in_child() -> None:
    """After a fork the parent's files are the parent's: cut the views, and open our own later."""
    global _lock
    _lock = RLock()
    for recorder in list(recorders.live):
        recorder.abandon()
    for entry in _open.values():
        if entry is not None:
            _, file = entry
            os.close(file.fd)
            try:
                file.memory.close()
            except BufferError:
                # A view lives on in something inherited; the lock is then held by us too,
                # until this child ends or executes another program.
                log.debug("stagescope: the parent's recorder file stays mapped")
    _open.clear()
    for probe in _probes:
        probe.close_inherited()
    _probes.clear()


atexit.register(_stop_probes)
os.register_at_fork(after_in_child=_forget_in_child)


def recorder_beside(carrier: str) -> Recorder | None:
    """Return this process's recorder, in the spool and for the service of *carrier*'s owner.

    None where there can be none, which is logged, or where the owner's file is gone.
    """
    path = carrier.split(";", 6)[-1]
    service = _service_of(path)
    return None if service is None else process_recorder(Path(path).parent, service)


@lru_cache(maxsize=64)
def _service_of(path: str) -> str | None:
    try:
        return service_of(Path(path))
    except (OSError, StagescopeError):
        return None
