"""A load run from a program: `stagescope.load_run` and `run_load`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stagescope.load_run import LoadPlan, run_load
from tests.support.http_server import ScriptedServer

SOURCES = Path(__file__).parents[2] / "src"

NO_AIOHTTP = "import sys; sys.modules['aiohttp'] = None\n"
"""As where the extra `load` is not installed: importing aiohttp raises ModuleNotFoundError."""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_run_load_returns_the_run_folder(tmp_path: Path) -> None:
    """Its path, its `run.json` and its report are those of one run."""
    plan = LoadPlan(rate_per_s=50, duration_s=0.4, warmup_s=0, body=b"x", out=tmp_path / "run")
    with ScriptedServer() as server:
        folder = run_load(plan, server.url)
    assert folder.path == tmp_path / "run"
    assert folder.run.plan.method == "POST"
    report = folder.report()
    assert report.run.run_id == folder.run.run_id
    assert report.client.answered == report.client.count > 0


def test_the_function_and_the_package_have_one_name() -> None:
    """`stagescope.load_run` can be called whichever of the two was imported first."""
    for first in ("from stagescope import load_run", "import stagescope.load_run"):
        done = python(
            f"{first}\nimport stagescope.load_run.plan, stagescope\n"
            "try: stagescope.load_run('ftp://x')\n"
            "except Exception as problem: print(problem)"
        )
        assert "is not a URL to load" in done.stdout, (first, done)


def test_a_missing_extra_is_one_sentence_in_a_program() -> None:
    """The name can be imported; the call says what to install, as an ImportError too."""
    done = python(
        f"{NO_AIOHTTP}from stagescope import load_run\n"
        "try: load_run('http://127.0.0.1:1/')\n"
        "except ImportError as missing: print(missing)"
    )
    assert done.stdout == (
        "this needs aiohttp, which is not installed: pip install 'stagescope[load]'\n"
    ), done


def test_a_missing_extra_is_one_sentence_on_the_command_line() -> None:
    """Every other command still works."""
    main = "from stagescope.cli import main; sys.exit(main(sys.argv[1:] or {args}))"
    done = python(NO_AIOHTTP + main.format(args=["load", "http://127.0.0.1:1/", "--quiet"]))
    assert done.returncode == 2
    assert done.stderr.startswith("stagescope load: this needs aiohttp, which is not installed")
    assert done.stderr.count("\n") == 1
    assert python(NO_AIOHTTP + main.format(args=["stacks", "--help"])).returncode == 0


def test_the_name_is_one_object_in_any_order() -> None:
    """Importing a module of the package after the function hides neither."""
    done = python(
        "from stagescope import load_run\nimport stagescope.load_run.plan\n"
        "import stagescope\nprint(stagescope.load_run is load_run, callable(load_run), "
        "stagescope.load_run.run_load.__name__)"
    )
    assert done.stdout == "True True run_load\n", done
