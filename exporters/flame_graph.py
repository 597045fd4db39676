"""A flame graph as one HTML file that needs nothing else: no network, no library.

First level: the stage; below it what ran in it, outermost first. Width: time. A click zooms, the
field searches. Of a difference red is what the slow requests had more of, blue less.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from stagescope.stacks import Frame, StackSpan, short_file

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
        """Return the child of that name, new or known."""
        return self.children.setdefault(name, Node(name))


def stage_of(span: StackSpan) -> str:
    """Return the name of the first level of *span*."""
    return span.stage or NO_STAGE


def place(frame: Frame) -> str:
    """Return a frame's name for merging: its function and file, whatever the line."""
    return f"{frame.function} ({short_file(frame.file)})" if frame.file else frame.function


def path_of(span: StackSpan) -> list[str]:
    """Return the names from the first level to the leaf."""
    return [stage_of(span), *[place(frame) for frame in span.frames]]


def seconds(spans: Iterable[StackSpan]) -> list[Weighed]:
    """Weigh each stack by the time that its samples stand for, in seconds."""
    return [(span, (span.end_ns - span.start_ns) / 1e9) for span in spans]


def tree(weighed: Sequence[Weighed]) -> Node:
    """Merge stacks."""
    root = Node("all")
    for span, weight in weighed:
        for node in _along(root, path_of(span)):
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


SMALLEST = 0.0005
"""Of the whole: what is smaller is not drawn, its parent shows a gap."""
TEMPLATE = "flame_graph.html"


def flame_graph(
    root: Node, title: str, subtitle: str, *, unit: str = "s", diff: bool = False
) -> str:
    """Return the page of *root*; *unit* is that of its weights, `share` of a difference."""
    whole = _width(root) or 1.0
    data = {
        "title": title,
        "subtitle": subtitle,
        "unit": unit,
        "diff": diff,
        "root": _drawn(root, whole * SMALLEST),
    }
    page = resources.files("stagescope.exporters").joinpath(TEMPLATE).read_text("utf-8")
    # A name may hold `</script>`, and a page must not end in it.
    return page.replace("/*DATA*/", json.dumps(data).replace("<", "\\u003c"))


def _drawn(node: Node, smallest: float) -> list[object]:
    """Return [name, weight, other, children] of what is wide enough, the widest child first."""
    children = sorted(_shown(node, smallest), key=lambda child: (-_width(child), child.name))
    weight: list[object] = [node.name, round(node.weight, 6)]
    return [*weight, round(node.other, 6), [_drawn(child, smallest) for child in children]]


def _shown(node: Node, smallest: float) -> Sequence[Node]:
    return [child for child in node.children.values() if _width(child) >= smallest]


def _width(node: Node) -> float:
    return (node.weight + node.other) / 2 if node.other else node.weight
