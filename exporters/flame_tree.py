"""Stacks merged into a tree: first level the stage, below it the frames, outermost first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stagescope.stacks import Frame, StackSpan

NO_STAGE = "(no stage)"
Weighed = tuple[StackSpan, float]
"""A stack and what it counts."""


@dataclass(slots=True)
class Node:
    """One place in the tree, with what ran there and below."""

    name: str
    weight: float = 0.0
    other: float = 0.0
    """What ran here in the set that is compared with, in the same unit; see `diff_tree`."""
    children: dict[str, Node] = field(default_factory=dict[str, "Node"])

    def child(self, name: str) -> Node:
        """Give the child of that name, new or known."""
        return self.children.setdefault(name, Node(name))


def stage_of(span: StackSpan) -> str:
    """Name the first level of *span*."""
    return span.stage or NO_STAGE


def place(frame: Frame) -> str:
    """Name a frame for merging: its function and file, whatever the line."""
    return f"{frame.function} ({short(frame.file)})" if frame.file else frame.function


def short(file: str) -> str:
    """Give the last two parts of a path; below `site-packages`, all of it."""
    _, packages, inside = file.partition("/site-packages/")
    return inside if packages else "/".join(file.split("/")[-2:])


def path_of(span: StackSpan) -> list[str]:
    """Give the names from the first level to the leaf."""
    return [stage_of(span), *[place(frame) for frame in span.frames]]


def seconds(spans: Iterable[StackSpan]) -> list[Weighed]:
    """Weigh each stack by the time that its samples stand for, in seconds."""
    return [(span, (span.end_ns - span.start_ns) / 1e9) for span in spans]


def tree(weighed: Sequence[Weighed]) -> Node:
    """Merge stacks."""
    root = Node("all")
    for span, weight in weighed:
        node = root
        node.weight += weight
        for name in path_of(span):
            node = node.child(name)
            node.weight += weight
    return root


def diff_tree(weighed: Sequence[Weighed], against: Sequence[Weighed]) -> Node:
    """Merge *weighed* and *against*, each to shares of its own whole (0 to 1)."""
    root = Node("all")
    for part, is_other in ((weighed, False), (against, True)):
        whole = sum(weight for _, weight in part) or 1.0
        for span, weight in part:
            for node in _along(root, path_of(span)):
                if is_other:
                    node.other += weight / whole
                else:
                    node.weight += weight / whole
    return root


def _along(root: Node, path: Sequence[str]) -> list[Node]:
    nodes = [root]
    for name in path:
        nodes.append(nodes[-1].child(name))
    return nodes
