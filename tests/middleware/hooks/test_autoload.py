"""The post-import trigger and the bootstrap: a hook comes with its framework, and changes nothing."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from stagescope.middleware.hooks import HOOKS
from stagescope.middleware.hooks.autoload import ImportWatch

SOURCE = Path(__file__).parents[3] / "src"
BOOTSTRAP = SOURCE / "stagescope" / "middleware" / "bootstrap"


class Watched:
    """A folder of frameworks, with a watch on one named `framework`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.imported: list[str] = []
        self.watch = ImportWatch(["framework", "framework.inner"], self._note)

    def _note(self, name: str) -> None:
        assert sys.modules[name].DONE  # executed to its end
        self.imported.append(name)

    def write(self, code: str) -> None:
        """Put the framework's code there."""
        package = self.folder / "framework"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(code)
        (package / "inner.py").write_text("DONE = True\n")
        importlib.invalidate_caches()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A watch that is at work during the test."""
    made = Watched(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [made.watch, *sys.meta_path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield made
    for name in ("framework", "framework.inner"):
        sys.modules.pop(name, None)


def test_it_calls_once_after_the_framework_is_loaded(watched: Watched) -> None:
    """Once for each name, when its code has run; a submodule is a name like any other."""
    watched.write("DONE = True\n")
    importlib.import_module("framework")
    assert watched.imported == ["framework"]
    importlib.import_module("framework.inner")
    importlib.reload(sys.modules["framework"])
    assert watched.imported == ["framework", "framework.inner"]


def test_the_frameworks_loader_stays_its_own(watched: Watched) -> None:
    """What the framework's own code sees of its spec and loader is what it would see without us."""
    watched.write(
        "DONE = type(__loader__).__name__ == 'SourceFileLoader'\n"
        "BARE = 'exec_module' not in vars(__spec__.loader)\n"
    )
    framework = importlib.import_module("framework")
    assert isinstance(framework.__loader__, SourceFileLoader)
    assert framework.BARE


def test_a_look_is_no_import(watched: Watched) -> None:
    """Who only asks whether the framework is there sets nothing off; the import later does."""
    watched.write("DONE = True\n")
    assert importlib.util.find_spec("framework")
    assert watched.imported == []
    importlib.import_module("framework")
    assert watched.imported == ["framework"]


def test_a_failed_import_is_the_frameworks_own(watched: Watched) -> None:
    """Its error comes through as it was; a second try that succeeds is noticed."""
    watched.write("raise OSError('not today')\n")
    with pytest.raises(OSError, match="not today"):
        importlib.import_module("framework")
    assert watched.imported == []
    watched.write("DONE = True\n")
    importlib.import_module("framework")
    assert watched.imported == ["framework"]


def test_what_is_not_there_is_not_found(watched: Watched) -> None:
    """A framework that is not installed gives the same error as ever."""
    with pytest.raises(ModuleNotFoundError, match="No module named 'framework'"):
        importlib.import_module("framework")


def python(script: str, *, interpreter: Path | str = sys.executable, **more: str) -> str:
    """Run *script* in a process with the bootstrap folder first; returns what it printed."""
    done = subprocess.run(
        [interpreter, "-c", script],
        env=os.environ | {"STAGESCOPE_RUN": "1", "PYTHONPATH": str(BOOTSTRAP)} | more,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own, in which stagescope is not installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    return folder / "bin" / "python"


def test_an_environment_without_stagescope_is_lent_it_alone(bare_python: Path) -> None:
    """The package is there, and nothing that lies beside it."""
    script = (
        "import sys, stagescope, stagescope.records; print(stagescope.__file__)\n"
        "print([p for p in sys.path if 'stagescope' in p], 'pytest' in sys.modules)"
    )
    path = str(SOURCE / "stagescope" / "__init__.py")
    assert python(script, interpreter=bare_python) == f"{path}\n[] False\n"


def test_at_start_no_framework_and_nothing_foreign_is_loaded(bare_python: Path) -> None:
    """A process that imports no framework pays for a few small modules of ours."""
    script = (
        "import sys\n"
        "print(*sorted(name for name in sys.modules if name.startswith('stagescope')))\n"
        "print('logging' in sys.modules, 'asyncio' in sys.modules)"
    )
    ours = ["stagescope", "stagescope.middleware", "stagescope.middleware.hooks",
            "stagescope.middleware.hooks.autoload", "stagescope.middleware.run_notes",
                "stagescope.settings"]  # fmt: skip
    assert python(script, interpreter=bare_python) == f"{' '.join(ours)}\nFalse False\n"


@pytest.mark.parametrize("off", [{"STAGESCOPE_DISABLE": "1"}, {"STAGESCOPE_RUN": ""}])
def test_switched_off_it_loads_nothing(off: dict[str, str]) -> None:
    """Where the run is switched off, or there is none, no module of ours is loaded."""
    assert python("import sys; print('stagescope.middleware' in sys.modules)", **off) == "False\n"


def test_a_broken_stagescope_does_not_stop_the_process(tmp_path: Path) -> None:
    """What goes wrong in the bootstrap is one line on standard error."""
    (tmp_path / "stagescope").mkdir()
    (tmp_path / "stagescope" / "__init__.py").write_text("raise OSError('broken')\n")
    done = subprocess.run(
        [sys.executable, "-c", "print('runs')"],
        env=os.environ
        | {"STAGESCOPE_RUN": "1", "PYTHONPATH": f"{BOOTSTRAP}{os.pathsep}{tmp_path}"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "runs\n"
    assert done.stderr.startswith("stagescope run: nothing is recorded in process ")
    assert done.stderr.endswith(": OSError: broken\n")


def test_every_hook_names_a_module() -> None:
    """The table's modules are there; none is loaded to find that out."""
    for name, place in HOOKS.items():
        module, _, attribute = place.partition(":")
        assert importlib.util.find_spec(module), name
        assert attribute, name
