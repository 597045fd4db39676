"""What a served process imports costs it nothing but the standard library."""

import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"

# -I and -S leave out whatever site-packages loads by itself (editable installs, coverage).
FOREIGN = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
exec(sys.argv[2])
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots - sys.stdlib_module_names - {"stagescope"}))
"""


def foreign_modules(statement: str) -> list[str]:
    """Run *statement* in a fresh interpreter with every package at hand; name those it loaded."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    prelude = f"import sys; sys.path += {packages!r}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", prelude + FOREIGN, str(SRC), statement],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FACE = "from stagescope import StageMiddleware, batch, carry, stage"


EMBEDDED = "from stagescope.embedded import start_embedded_agent"
"""Run on the served app's thread; the agent is imported on its own."""


@pytest.mark.parametrize(
    "statement", ["import stagescope", "import stagescope.middleware", FACE, EMBEDDED]
)
def test_import_loads_the_standard_library_alone(statement: str) -> None:
    """Importing what a server needs loads no package from outside the standard library."""
    assert foreign_modules(statement) == []


def test_a_foreign_import_is_seen() -> None:
    """The measure itself sees a package that is not in the standard library."""
    assert "psutil" in foreign_modules("import psutil")
