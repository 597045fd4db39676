"""When the hardware counters may be read."""

from pathlib import Path

import pytest

from stagescope.agent.gpu.select import LOOK_S, counters_allowed


def proc(folder: Path, *names: str) -> Path:
    """Make a /proc tree of processes so named."""
    for pid, name in enumerate(names, 1):
        (folder / str(pid)).mkdir(parents=True)
        (folder / str(pid) / "comm").write_text(f"{name}\n")
    return folder


@pytest.mark.parametrize("name", ["dcgm-exporter", "nv-hostengine"])
def test_they_are_left_to_dcgm(tmp_path: Path, name: str) -> None:
    """Where DCGM runs they are not read, unless asked for; a minute after it has gone they are."""
    folder = proc(tmp_path, "bash", name)
    now = 0.0
    allowed = counters_allowed({}, proc=folder, clock=lambda: now)
    assert not allowed()
    assert counters_allowed({"STAGESCOPE_GPM": "on"}, proc=folder)()
    (folder / "2" / "comm").write_text("other\n")
    assert not allowed()
    now = LOOK_S
    assert allowed()


def test_the_governor_and_the_user_may_forbid_them(tmp_path: Path) -> None:
    """Both can switch them off, and the governor also where the user asked for them."""
    folder = proc(tmp_path, "bash")
    assert counters_allowed({}, proc=folder)()
    assert not counters_allowed({"STAGESCOPE_GPM": "off"}, proc=folder)()
    assert not counters_allowed({}, lambda: False, proc=folder)()
    assert not counters_allowed({"STAGESCOPE_GPM": "on"}, lambda: False, proc=folder)()
