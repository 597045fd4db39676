"""What the tests of real servers share: the Python in which the server is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server_python(request: pytest.FixtureRequest) -> Path:
    """Return the Python that has the server of this test's folder; fail where there is none."""
    name = request.path.parent.name
    variable = f"STAGESCOPE_SERVER_PYTHON_{name.upper()}"
    python = Path(os.environ.get(variable) or ROOT / ".venv-servers" / name / "bin" / "python")
    if not python.exists():
        pytest.fail(
            f"{python} is not there: `make test-servers ARGS={name}` makes an environment with "
            f"{name} and runs these tests; or set {variable} to a Python that has it",
            pytrace=False,
        )
    return python


@pytest.fixture
def server_environment(tmp_path: Path) -> dict[str, str]:
    """Return a server's environment: our source on its path, a spool of its own, faults raised."""
    spool = tmp_path / "spool"
    return os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONUNBUFFERED": "1",
        "STAGESCOPE_SPOOL": str(spool),
        "STAGESCOPE_RAISE": "1",
    }
