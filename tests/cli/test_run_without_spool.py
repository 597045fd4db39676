"""`stagescope run` where no spool can be written: the server matters more than what we see of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import os, sys; print(os.getpid(), os.environ.get('STAGESCOPE_RUN')); sys.exit(7)"


@pytest.mark.parametrize("unusable", ["/proc/stagescope", "file"])
def test_the_server_is_started_without_us(unusable: str, tmp_path: Path) -> None:
    """One sentence names spool and cause; the command takes our place, with its own exit code."""
    (tmp_path / "file").touch()
    spool = tmp_path / unusable
    process = subprocess.Popen(
        [sys.executable, "-m", "stagescope", "run", "--spool", str(spool), "--",
         sys.executable, "-c", CODE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    out, said = process.communicate(timeout=60)

    assert out.split() == [str(process.pid), "None"]
    assert process.returncode == 7
    assert said.count("\n") == 1
    assert said.startswith(f"stagescope run: nothing is recorded: spool {spool} ")
    assert said.endswith("; the server is started without stagescope\n")


def test_a_command_that_cannot_be_run_is_said_then_too() -> None:
    """The exit code is a shell's."""
    done = subprocess.run(
        [sys.executable, "-m", "stagescope", "run", "--spool", "/proc/stagescope", "--", "/etc"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 126
