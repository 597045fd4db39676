"""Who drains a spool: one holder, also where its folder or files are taken away or prepared."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.agent.drain import FILE_NAME, Cursor, load_cursors, save_cursors
from stagescope.agent.lock import AGENT, held, holder, try_hold
from stagescope.errors import EXIT_HELD, StagescopeError
from stagescope.recorder.spool import LOCK_NAME, SOCKET_NAME
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.rings import RingWriter


def test_a_lock_that_was_deleted_is_no_longer_valid(tmp_path: Path) -> None:
    """The next one gets the spool, and the first can tell that it has lost it."""
    first = try_hold(tmp_path, AGENT)
    assert first is not None
    assert first.valid()
    assert try_hold(tmp_path, AGENT) is None
    (tmp_path / LOCK_NAME).unlink()

    second = try_hold(tmp_path, AGENT)
    assert second is not None
    assert (first.valid(), second.valid()) == (False, True)
    first.release()
    assert held(tmp_path)
    assert holder(tmp_path)["pid"] == os.getpid()
    second.release()
    assert not held(tmp_path)


def test_files_that_somebody_prepared_are_not_written(tmp_path: Path) -> None:
    """A link in the place of the lock is refused, one in that of the cursors replaced."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    spool = tmp_path / "spool"
    spool.mkdir()
    for name in (LOCK_NAME, f".{FILE_NAME}.part", FILE_NAME):
        (spool / name).symlink_to(precious)

    with pytest.raises(StagescopeError, match=r"lock file .* cannot be opened"):
        try_hold(spool, AGENT)
    assert holder(spool) == {}
    save_cursors(spool, {"a": Cursor(5, 3)})

    assert load_cursors(spool) == {"a": Cursor(5, 3)}
    assert precious.read_text() == "precious"


def test_an_agent_whose_spool_was_deleted_begins_anew() -> None:
    """It makes spool, lock and socket again, and a second agent finds it there."""
    with short_spool() as folder, AgentProcesses() as start:
        spool = folder / "spool"
        process = start(spool)
        shutil.rmtree(spool)

        client = AgentClient(spool / SOCKET_NAME)
        wait_until(lambda: (spool / SOCKET_NAME).exists() and held(spool), timeout_s=20)
        assert client.health()["pid"] == process.pid
        with RingWriter(spool / "new.ring") as writer:
            writer.request("run")
            wait_until(lambda: client.run_counts("run").finished == 1, timeout_s=20)

        second = start(spool, answers=False)
        assert second.wait(20) == EXIT_HELD
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        said, _ = process.communicate()
        assert f"spool {spool}, or the lock in it, was deleted" in said


def test_an_agent_that_lost_its_spool_leaves_it_to_another() -> None:
    """Two agents never drain one spool: who comes second has it, the first ends and says so."""
    with short_spool() as folder, AgentProcesses() as start:
        spool = folder / "spool"
        first = start(spool)
        first.send_signal(signal.SIGSTOP)
        shutil.rmtree(spool)
        second = start(spool)
        first.send_signal(signal.SIGCONT)

        assert first.wait(20) == EXIT_HELD
        _, said = first.communicate()
        assert f"held by agent pid {second.pid}" in said
        assert AgentClient(spool / SOCKET_NAME).health()["pid"] == second.pid
        assert held(spool)
