"""The documents hold: their Python runs, their links lead somewhere, and the index is whole.

A block fenced as ```python run is run in a process of its own; one fenced as ```python is
compiled, since it needs a server, a model or a file that a document cannot bring.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = {"build", "dist", "node_modules", "runs"}

FENCED = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
OWN = "https://github.com/stagescope/stagescope/blob/main/"
"""README is also the package index's page, where only absolute links work."""


class Block(NamedTuple):
    """One fenced block of a document."""

    path: Path
    line: int
    info: str
    text: str

    @property
    def where(self) -> str:
        """Return the block's place for people: `README.md:12`."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def documents() -> Iterator[Path]:
    """Yield every Markdown file of the tree, without what was built or downloaded."""
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        if not GENERATED.intersection(parts) and not any(part.startswith(".") for part in parts):
            yield path


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of one document."""
    text = path.read_text(encoding="utf-8")
    for found in FENCED.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(path, line, found["info"].strip(), found["text"])


def prose(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def links(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the links of one document into this tree, as written and as the file that each names."""
    for found in LINK.finditer(prose(path)):
        target, _, _ = found["target"].partition("#")
        if target.startswith(OWN):
            yield target, ROOT / target.removeprefix(OWN)
        elif target and not re.match(r"[a-z]+:", target):
            yield target, (path.parent / target).resolve()


PYTHON = [
    block for path in documents() for block in blocks(path) if block.info.startswith("python")
]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_block_compiles(block: Block) -> None:
    """A Python block of a document is Python, and marked in one of the two ways."""
    assert block.info in {"python", "python run"}, f"{block.where}: fence it ```python [run]"
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize(
    "block",
    [block for block in PYTHON if block.info == "python run"],
    ids=lambda block: block.where,
)
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    """A Python block marked `run` ends without an error, warnings included, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.text],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{block.where}\n{done.stderr}"


@pytest.mark.parametrize("path", list(documents()), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Every link of a document into this tree names a file or folder that is there."""
    broken = [written for written, target in links(path) if not target.exists()]
    assert not broken, f"{path.relative_to(ROOT)} links to what is not there: {', '.join(broken)}"


def test_the_package_indexs_page_links_absolutely() -> None:
    """README is shown there, where a link into this tree leads nowhere."""
    page = ROOT / "README.md"
    assert [written for written, _ in links(page) if not written.startswith(OWN)] == []


def test_index_is_whole() -> None:
    """Every page in docs/ is named in docs/README.md, so that a reader can find it."""
    index = ROOT / "docs" / "README.md"
    named = {target for _, target in links(index)} | {index}
    pages = {path for path in documents() if (ROOT / "docs") in path.parents}
    missing = sorted(str(page.relative_to(index.parent)) for page in pages - named)
    assert not missing, f"docs/README.md does not link to {', '.join(missing)}"


def test_printed_parts_are_as_the_code_has_them() -> None:
    """The tables that `scripts/pages` prints into the documents are up to date."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "pages", "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
