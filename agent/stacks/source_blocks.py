"""Where in a source file the blocks of stages are: `with stage("NAME"):` and a batch's phases.

Pure functions of the source's text. A line belongs to the innermost block that is executed there:
the body of a function defined inside a block is not, it runs when somebody calls it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

OURS = "stagescope"
PHASES = {"collate": "batch.collate", "inference": "inference"}
"""Methods of a batch that are phases, and the stage that each of them is."""
CALLS = {"model_call": "inference"}
"""Context managers of ours that are always the same stage."""

_MAY_OPEN = re.compile(
    r"\b(?:stage|model_call)\s*\(|\b(?:stage|model_call)\s+as\b|\.(?:collate|inference)\s*\(\s*\)"
)
"""What a file with a block of a stage has in it.

Others are not parsed: a tree is tens of thousands of objects, at which Python's garbage collector
looks through the whole process, a served app's where the agent is a thread of it.
"""

_WAITS = ("sleep(", "select(", "acquire(", "recv(", "recv_into(", "accept(", "wait(")


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a source file's lines."""

    stages: Mapping[int, str] = field(default_factory=dict[int, str])
    """Line → full name of the stage whose block it is in."""
    waits: frozenset[int] = frozenset()
    """Lines that call something which, by its name, waits."""


def read_source(text: bytes) -> Source:
    """Read a file's *text*; what cannot be parsed has no blocks."""
    decoded = text.decode("utf-8", "replace")
    waits = frozenset(line for call in _WAITS for line in _lines_with(decoded, call))
    if OURS not in decoded or not _MAY_OPEN.search(decoded):
        return Source(waits=waits)
    try:
        tree = ast.parse(decoded)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Source(waits=waits)
    return Source(_Blocks(tree).stages, waits)


def _lines_with(text: str, call: str) -> Iterator[int]:
    # By `find`: a pattern of all names takes ten times as long, and files are many.
    at = text.find(call)
    while at >= 0:
        if not (at and (text[at - 1].isalnum() or text[at - 1] == "_")):
            yield text.count("\n", 0, at) + 1
        at = text.find(call, at + 1)


class _Blocks:
    """Walks one module."""

    def __init__(self, tree: ast.Module) -> None:
        self.stages: dict[int, str] = {}
        self._modules: set[str] = set()
        self._names: dict[str, str] = {}
        """Local name → our name."""
        self._constants: dict[str, str] = {}
        for node in ast.walk(tree):
            self._learn_import(node)
        for statement in tree.body:
            self._learn_constant(statement)
        self._visit(tree, "")

    def _learn_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == OURS:
                    self._modules.add(name.asname or OURS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == OURS:
            for name in node.names:
                self._names[name.asname or name.name] = name.name

    def _learn_constant(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            return
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            self._constants.update(dict.fromkeys(names, value.value))

    def _visit(self, node: ast.AST, stage: str) -> None:
        if isinstance(node, ast.With | ast.AsyncWith):
            opened = [self._stage_of(item.context_expr) for item in node.items]
            inside = next(filter(None, reversed(opened)), stage)
            self._visit_body(node.body, inside, changed=inside != stage)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._visit_body(node.body, "", changed=bool(stage))
        else:
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.expr):
                    self._visit(child, stage)

    def _visit_body(self, body: list[ast.stmt], stage: str, *, changed: bool) -> None:
        for statement in body if changed else ():
            self._set(statement.lineno, statement.end_lineno or statement.lineno, stage)
        for statement in body:
            self._visit(statement, stage)

    def _set(self, first: int, last: int, stage: str) -> None:
        for line in range(first, last + 1):
            if stage:
                self.stages[line] = stage
            else:
                self.stages.pop(line, None)

    def _stage_of(self, opened: ast.expr) -> str:
        if not isinstance(opened, ast.Call):
            return ""
        called = opened.func
        ours = self._ours(called)
        if ours in CALLS:
            return CALLS[ours]
        if ours == "stage":
            return self._text(opened.args[0]) if len(opened.args) == 1 else ""
        if isinstance(called, ast.Attribute) and not opened.args and not opened.keywords:
            return PHASES.get(called.attr, "")
        return ""

    def _ours(self, called: ast.expr) -> str:
        """Return the name of ours that *called* is; empty where it is none."""
        if isinstance(called, ast.Name):
            return self._names.get(called.id, "")
        if isinstance(called, ast.Attribute) and _root(called) in self._modules:
            return called.attr
        return ""

    def _text(self, argument: ast.expr) -> str:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
        return self._constants.get(argument.id, "") if isinstance(argument, ast.Name) else ""


def _root(chain: ast.expr) -> str:
    while isinstance(chain, ast.Attribute):
        chain = chain.value
    return chain.id if isinstance(chain, ast.Name) else ""


MOST_FILES = 4000
MAX_BYTES = 4 << 20
NONE = Source()


@dataclass(frozen=True, slots=True)
class _Read:
    mtime_ns: int
    size: int
    source: Source


class SourceFiles:
    """Reads the source files of processes; of one that cannot be read nothing is known."""

    def __init__(self) -> None:
        self._read: dict[str, _Read] = {}

    def of(self, pid: int, files: Iterable[str]) -> dict[str, Source]:
        """Return by name what *files*, as frames of process *pid* name them, say of their lines."""
        root, folder = _file_root(pid), _folder(pid)
        return {
            file: self._source(f"{root}{os.path.join(folder, file)}")
            if file and not file.startswith("<")
            else NONE
            for file in files
        }

    def _source(self, path: str) -> Source:
        try:
            status = os.stat(path)
            known = self._read.get(path)
            if known and (known.mtime_ns, known.size) == (status.st_mtime_ns, status.st_size):
                return known.source
            source = NONE if status.st_size > MAX_BYTES else read_source(Path(path).read_bytes())
        except (OSError, ValueError):  # a name with a null byte is a ValueError
            return NONE
        if len(self._read) >= MOST_FILES:
            self._read.clear()
        self._read[path] = _Read(status.st_mtime_ns, status.st_size, source)
        return source


def _file_root(pid: int) -> str:
    """Return the prefix of a path of process *pid* here: none where its mounts are ours."""
    try:
        same = os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:  # it has exited, or is another user's: the plain path may still be right
        return ""
    return "" if same else f"/proc/{pid}/root"


def _folder(pid: int) -> str:
    """Return the folder in which process *pid* works; the root where that cannot be read."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return "/"
