"""Every `STAGESCOPE_*` variable is defined, read and documented in one place."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest

from stagescope import settings
from stagescope.agent.events import KINDS as TRIGGER_KINDS
from stagescope.agent.process import Settings as AgentOptions
from stagescope.agent.process import run_agent
from stagescope.agent.samplers import KINDS as SAMPLER_KINDS
from stagescope.agent.samplers import chosen
from stagescope.agent.triggers.triggers import Settings as TriggerSettings
from stagescope.agent.triggers.triggers import settings as trigger_settings
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


@pytest.mark.parametrize(
    ("value", "on"), [("", False), ("0", False), ("off", False), ("1", True), ("yes", True)]
)
def test_a_switch(value: str, on: bool) -> None:
    """`0` and its like are off, anything else is on, and nothing is the default."""
    assert settings.GIL.on({settings.GIL.name: value}) is on


def test_a_wrong_choice_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    """It is named; a served process logs it once and goes on with the default."""
    environ = {"STAGESCOPE_STACKS": "sometimes"}
    wanted = "STAGESCOPE_STACKS=sometimes: give runs or always or off"
    assert settings.STACKS.problem(environ) == wanted
    with caplog.at_level(logging.WARNING):
        assert settings.STACKS.choice(environ) == "runs"
        assert settings.STACKS.choice(environ) == "runs"
    assert caplog.text.count("sometimes") == 1


def test_numbers_and_names() -> None:
    """`off` is no limit; what is no number above 0 is refused; names stand between commas."""
    assert settings.LOOP_LIMIT_MS.number({}) == 250
    assert math.isinf(settings.LOOP_LIMIT_MS.number({"STAGESCOPE_LOOP_LIMIT_MS": "off"}))
    for wrong in ("-1", "0", "nan", "inf", "soon"):
        environ = {"STAGESCOPE_LOOP_LIMIT_MS": wrong}
        assert "give milliseconds" in settings.LOOP_LIMIT_MS.problem(environ)
        assert settings.LOOP_LIMIT_MS.number(environ) == 250
    assert settings.TRIGGERS.names({"STAGESCOPE_TRIGGERS": " slow, oom ,"}) == ("slow", "oom")


def test_what_is_wrong_in_an_environment_is_named() -> None:
    """A misspelt name and a wrong value are a sentence each; what is right is none."""
    environ = {"STAGESCOPE_SPOOl": "x", "STAGESCOPE_GPU": "amd", "STAGESCOPE_GIL": "1", "HOME": "/"}

    assert list(settings.problems(environ)) == [
        "STAGESCOPE_GPU=amd: give nvml or torch or off",
        "STAGESCOPE_SPOOl is no setting; see docs/configuration.md",
    ]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (settings.STACKS, "often"),
        (settings.AGENT_BUDGET, "nan"),
        (settings.LOOP_LIMIT_MS, "-1"),
        (settings.SAMPLERS, "gpu,rain"),
        (settings.TRIGGERS, "flow"),
        (settings.KERNELS, "sometimes"),
    ],
)
def test_the_agents_command_refuses_a_wrong_value(
    setting: settings.Setting, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a usage error before anything is touched."""
    monkeypatch.setenv(setting.name, text)
    with pytest.raises(UsageError, match=f"{setting.name}={text}: give "):
        run_agent(AgentOptions(spool=tmp_path / "spool", metrics="off"))
    assert not (tmp_path / "spool").exists()


def test_an_embedded_agent_goes_on_with_the_default() -> None:
    """A wrong name samples what fits, a wrong trigger leaves all: a server loses nothing by it."""
    assert chosen(environment={"STAGESCOPE_SAMPLERS": "gpu,rain"}).names == settings.SAMPLER_NAMES
    wrong = {"STAGESCOPE_TRIGGERS": "flow", "STAGESCOPE_KERNELS": "sometimes"}
    assert trigger_settings(wrong) == TriggerSettings()


def test_names_that_live_elsewhere_too_are_the_same() -> None:
    """Samplers and triggers are those of their own modules."""
    assert tuple(SAMPLER_KINDS) == settings.SAMPLER_NAMES
    assert tuple(TRIGGER_KINDS) == settings.TRIGGER_NAMES


def test_a_wrong_value_steers_no_terminal() -> None:
    """Escapes, bytes that are no text and endless values are shown harmlessly."""
    shown = settings.STACKS.problem({"STAGESCOPE_STACKS": "\x1b[2J\udcff" + "x" * 1000})
    assert shown.isprintable()
    assert len(shown) < 200
