"""A flame graph as one HTML file that needs nothing else: no network, no library.

First level: the stage; below it what ran in it, outermost first. Width: time. A click zooms, the
field searches. Of a difference red is what the slow requests had more of, blue less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

from stagescope.exporters.flame_tree import Node

SMALLEST = 0.0005
"""Of the whole: what is smaller is not drawn, its parent shows a gap."""
TEMPLATE = "flame_graph.html"


def flame_graph(
    root: Node, title: str, subtitle: str, *, unit: str = "s", diff: bool = False
) -> str:
    """Give the page of *root*; *unit* is that of its weights, `share` of a difference."""
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
    """Give [name, weight, other, children] of what is wide enough, the widest child first."""
    children = sorted(_shown(node, smallest), key=lambda child: (-_width(child), child.name))
    weight: list[object] = [node.name, round(node.weight, 6)]
    return [*weight, round(node.other, 6), [_drawn(child, smallest) for child in children]]


def _shown(node: Node, smallest: float) -> Sequence[Node]:
    return [child for child in node.children.values() if _width(child) >= smallest]


def _width(node: Node) -> float:
    return (node.weight + node.other) / 2 if node.other else node.weight
