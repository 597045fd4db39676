"""A stand-in for NVIDIA's driver library, for tests on machines without a GPU (README.md here).

It proves that we call the real bindings rightly and bear what they answer; it proves nothing about
a real driver.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in.c")
LIBRARY = "libnvidia-ml.so.1"
CONTROL_VARIABLE = "STAGESCOPE_NVML_STAND_IN"

NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
UNKNOWN = 999


def compile_stand_in(folder: Path, without: Sequence[str] = ()) -> Path:
    """Compile the library into *folder*, *without* some of its functions; give its path.

    Raises AssertionError where there is no C compiler, or the library does not compile.
    """
    compiler = shutil.which("cc")
    assert compiler, "no C compiler (`cc`) here: the stand-in for libnvidia-ml.so.1 needs one"
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / "hidden.map"
    hidden.write_text("{ local: " + " ".join(f"{name};" for name in (*without, "none")) + " };\n")
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread",
         f"-Wl,--version-script={hidden}", "-o", str(folder / LIBRARY), str(SOURCE)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return folder / LIBRARY


class StandIn:
    """A compiled library, and the file that tells it what to answer."""

    def __init__(self, library: Path, control: Path) -> None:
        self.library = library
        self.control = control
        self.tell()

    def tell(self, *lines: str) -> None:
        """Have it answer by *lines* from now on, and by its defaults where they say nothing."""
        new = self.control.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.control)

    def calls(self) -> Counter[str]:
        """Count the calls so far, by function."""
        path = Path(f"{self.control}.calls")
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(line.partition(" ")[0] for line in lines)

    def environment(self) -> Mapping[str, str]:
        """Return what makes a process that is started find this library, and no other."""
        path = os.pathsep.join(
            filter(None, (str(self.library.parent), os.environ.get("LD_LIBRARY_PATH")))
        )
        return {"LD_LIBRARY_PATH": path, CONTROL_VARIABLE: str(self.control)}
