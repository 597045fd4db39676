"""The stand-in for NVIDIA's library, compiled once."""

from pathlib import Path

import pytest

from tests.support.nvml import StandIn, compile_stand_in


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole library."""
    return compile_stand_in(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def stand_in(library: Path, tmp_path: Path) -> StandIn:
    """The library, and a control file of the test's own."""
    return StandIn(library, tmp_path / "control")
