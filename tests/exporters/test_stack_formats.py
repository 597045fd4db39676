"""Files of other tools, read back."""

import gzip
import json
import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stagescope.exporters.flame_graph import Node, diff_tree, flame_graph, seconds, tree
from stagescope.exporters.stack_formats import collapsed, pprof, profile_type, speedscope
from stagescope.stacks import Frame, StackSpan

FRAMES = st.builds(
    Frame, st.sampled_from(["a", "b;x", "</script>"]), st.sampled_from(["/p/m.py", "q.py"]),
    st.integers(0, 9),
)  # fmt: skip
SPANS = st.lists(
    st.builds(
        lambda start, samples, stage, frames, running: StackSpan(
            1, 2, "MainThread", start, start + samples * 10, samples, stage, "block", running,
            tuple(frames), "window", "py-spy",
        ),
        st.integers(0, 10**12), st.integers(1, 9), st.sampled_from(["", "preprocess", "mine.x"]),
        st.lists(FRAMES, min_size=1, max_size=5), st.booleans(),
    ),
    min_size=1, max_size=20,
)  # fmt: skip


@given(SPANS)
def test_collapsed_has_every_sample(spans: list[StackSpan]) -> None:
    """One line a stack; its parts are the stage and the frames; samples add up."""
    lines = collapsed(spans).splitlines()
    counts = [line.rpartition(" ") for line in lines]
    assert sum(int(count) for _, _, count in counts) == sum(span.samples for span in spans)
    depths = {len(stack.split(";")) for stack, _, _ in counts}
    assert depths == {1 + len(span.frames) for span in spans}


@given(SPANS)
def test_speedscope_has_every_frame_in_its_stage(spans: list[StackSpan]) -> None:
    """One profile a stage; weights add up; every index names a frame."""
    document = json.loads(json.dumps(speedscope(spans, "run")))
    frames = document["shared"]["frames"]
    told: Counter[tuple[str, int, str]] = Counter()
    for profile in document["profiles"]:
        assert profile["endValue"] == sum(profile["weights"])
        for sample, weight in zip(profile["samples"], profile["weights"], strict=True):
            leaf = frames[sample[-1]]
            told[profile["name"], leaf["line"], leaf["name"]] += weight
    expected: Counter[tuple[str, int, str]] = Counter()
    for span in spans:
        leaf_ = span.frames[-1]
        key = (span.stage or "(no stage)", leaf_.line, leaf_.function)
        expected[key] += span.end_ns - span.start_ns
    assert told == expected


@given(SPANS)
def test_pprof_gives_back_what_went_in(spans: list[StackSpan]) -> None:
    """Functions, lines, stages and values, through the wire format."""
    profile = profile_type().FromString(gzip.decompress(pprof(spans)))
    strings = profile.string_table
    assert strings[0] == ""
    functions = {f.id: (strings[f.name], strings[f.filename]) for f in profile.function}
    places = {
        at.id: Frame(*functions[at.line[0].function_id], at.line[0].line) for at in profile.location
    }
    assert [strings[t.unit] for t in profile.sample_type] == ["count", "nanoseconds"]
    for sample, span in zip(profile.sample, spans, strict=True):
        assert tuple(places[at] for at in reversed(sample.location_id)) == span.frames
        assert list(sample.value) == [span.samples, span.end_ns - span.start_ns]
        labels = {strings[label.key]: strings[label.str] or label.num for label in sample.label}
        assert labels == {"stage": span.stage or "(no stage)", "thread": "MainThread", "pid": 1}


def _data(page: str) -> dict[str, list[object]]:
    found = re.search(r"const DATA = (.*);\n", page)
    assert found
    data: dict[str, list[object]] = json.loads(found[1])
    return data


def _check(node: list[object], *, diff: bool) -> None:
    """A node is at least as wide as its children together: nothing is drawn outside."""
    _, weight, other, children = node
    assert isinstance(children, list)
    for place, own in ((1, weight), (2, other)):
        assert isinstance(own, float | int)
        assert sum(child[place] for child in children) <= own + 1e-4
    for child in children:
        _check(child, diff=diff)


@given(SPANS, SPANS)
def test_a_flame_graph_is_one_page_of_its_own(
    spans: list[StackSpan], more: list[StackSpan]
) -> None:
    """No network, no way out of the script, children within their parents, stages first."""
    page = flame_graph(tree(seconds(spans)), "t", "s")
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("</script>") == 1
    root = _data(page)["root"]
    _check(root, diff=False)
    assert isinstance(root[3], list)
    assert {child[0] for child in root[3]} == {span.stage or "(no stage)" for span in spans}
    both = flame_graph(diff_tree(seconds(spans), seconds(more)), "t", "s", unit="share", diff=True)
    _check(_data(both)["root"], diff=True)


def test_what_is_too_small_to_see_is_left_out() -> None:
    """A page of a long run stays small; the parent keeps its width."""
    root = Node("all", 1.0, 0.0, {"wide": Node("wide", 0.9999), "tiny": Node("tiny", 0.0001)})
    assert [child[0] for child in _data(flame_graph(root, "t", "s"))["root"][3]] == ["wide"]  # type: ignore[attr-defined]
