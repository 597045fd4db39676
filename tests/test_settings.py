"""Every `STAGESCOPE_*` variable is defined, read and documented in one place."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest

from stagescope import settings
from stagescope.errors import UsageError

ROOT = Path(__file__).parents[1]
PRODUCT = ("agent", "analysis", "exporters", "loadgen", "middleware", "src/stagescope")
READ = re.compile(r"""(?:environ(?:ment)?(?:\.get)?[\[(]|getenv\()\s*["']STAGESCOPE_""")
READS_BEFORE_IMPORTS = "middleware/bootstrap/sitecustomize.py"
"""Runs in every Python process below `stagescope run`, before it is known whether to import us."""


def test_nobody_else_reads_a_variable_of_ours() -> None:
    """Only settings.py reads STAGESCOPE_* from the environment."""
    found = [
        str(path.relative_to(ROOT))
        for folder in PRODUCT
        for path in sorted((ROOT / folder).rglob("*.py"))
        if READ.search(path.read_text("utf-8"))
    ]
    assert set(found) <= {READS_BEFORE_IMPORTS}


def test_every_variable_that_the_product_names_is_defined() -> None:
    """A name in code or help that is no setting would be a promise that nothing keeps."""
    known = {setting.name for setting in settings.SETTINGS}
    named = {
        name
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bSTAGESCOPE_[A-Z][A-Z_]*[A-Z]\b", path.read_text("utf-8"))
    }
    assert named <= known


def test_the_page_is_printed_from_the_table() -> None:
    """docs/configuration.md is `settings.page()`."""
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == settings.page()


@pytest.mark.parametrize(
    ("value", "on"), [("", False), ("0", False), ("off", False), ("1", True), ("yes", True)]
)
def test_a_switch(value: str, on: bool) -> None:
    """`0` and its like are off, anything else is on, and nothing is the default."""
    assert settings.GIL.on({settings.GIL.name: value}) is on


def test_a_wrong_choice_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    """A command refuses it; a served process logs it once and goes on with the default."""
    environ = {"STAGESCOPE_STACKS": "sometimes"}
    with pytest.raises(UsageError, match="STAGESCOPE_STACKS=sometimes: give runs or always or off"):
        settings.STACKS.choice(environ, strict=True)

    with caplog.at_level(logging.WARNING):
        assert settings.STACKS.choice(environ) == "runs"
        assert settings.STACKS.choice(environ) == "runs"
    assert caplog.text.count("sometimes") == 1


def test_numbers_and_names() -> None:
    """`off` is no limit; what is no number above 0 is refused; names stand between commas."""
    assert settings.LOOP_LIMIT_MS.number({}) == 250
    assert math.isinf(settings.LOOP_LIMIT_MS.number({"STAGESCOPE_LOOP_LIMIT_MS": "off"}))
    for wrong in ("-1", "0", "nan", "inf", "soon"):
        with pytest.raises(UsageError, match="give milliseconds"):
            settings.LOOP_LIMIT_MS.number({"STAGESCOPE_LOOP_LIMIT_MS": wrong}, strict=True)
    assert settings.TRIGGERS.names({"STAGESCOPE_TRIGGERS": " slow, error ,"}) == ("slow", "error")


def test_what_is_wrong_in_an_environment_is_named() -> None:
    """A misspelt name and a wrong value are a sentence each; what is right is none."""
    environ = {"STAGESCOPE_SPOOl": "x", "STAGESCOPE_GPU": "amd", "STAGESCOPE_GIL": "1", "HOME": "/"}

    assert list(settings.problems(environ)) == [
        "STAGESCOPE_GPU=amd: give nvml or torch or off",
        "STAGESCOPE_SPOOl is no setting; see docs/configuration.md",
    ]
