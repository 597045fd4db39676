"""The doctor's judgement: grants for any mix of rights, and checks that hang or fail."""

import threading
from contextlib import closing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stagescope import stage
from stagescope.agent.doctor import gpu
from stagescope.agent.doctor.environment import Environment, Served
from stagescope.agent.doctor.examine import Check, examine
from stagescope.agent.doctor.finding import KERNELS, OK, SPANS, STACKS, WARN, Finding
from stagescope.agent.probe import probe_of
from stagescope.agent.stacks.permissions import Rights
from stagescope.middleware.probe.server import Probe
from stagescope.recorder.reader import RecorderReader
from stagescope.testing.recording import Recording

AROUND = Environment(Path("/nowhere"))

rights = st.builds(
    Rights,
    yama=st.sampled_from([None, 0, 1, 2, 3]),
    capable=st.booleans(),
    container=st.sampled_from(["", "docker", "podman", "kubernetes"]),
    owner=st.sampled_from([None, 0, 1000]),
    me=st.sampled_from([0, 1000]),
    same_namespace=st.booleans(),
    asks_leave=st.booleans(),
)


@given(rights)
def test_there_is_a_grant_wherever_something_stands_in_the_way(found: Rights) -> None:
    """Every obstacle has its grant; where there is none, nothing is asked for."""
    assert bool(found.obstacles()) == bool(found.grants())


@given(rights)
def test_a_capability_is_not_asked_for_where_it_is_held(found: Rights) -> None:
    """Who has CAP_SYS_PTRACE is not told to get it."""
    if found.capable:
        assert not any("SYS_PTRACE" in grant for grant in found.grants())


def test_a_pid_namespace_is_shared_by_the_words_of_its_platform() -> None:
    """Docker's option, and a pod's field; in a pod the pod's alone."""
    apart = Rights(None, True, "docker", same_namespace=False)
    assert apart.grants()[0] == "docker run --pid=container:SERVER"
    pod = Rights(None, True, "kubernetes", same_namespace=False)
    assert pod.grants() == ["shareProcessNamespace: true (in the pod's spec)"]


def test_yama_at_1_is_no_obstacle_where_the_server_lets_us_in() -> None:
    """A server whose probe names us as its tracer needs no grant; at 2 it does."""
    assert Rights(1, False, "", 0, 0, asks_leave=True).obstacles() == []
    assert Rights(2, False, "", 0, 0, asks_leave=True).obstacles() != []


def test_a_check_that_hangs_or_fails_is_its_own_line_alone() -> None:
    """The others are there, in their order; the screen does not wait for the one that hangs."""
    release = threading.Event()

    def hang(around: Environment) -> Finding:
        release.wait(30)
        return Finding(OK, "late")

    def fail(around: Environment) -> Finding:
        raise KeyError("oops")

    def well(around: Environment) -> Finding:
        return Finding(OK, "well", gives=(SPANS, STACKS))

    def no(around: Environment) -> Finding:
        return Finding(WARN, "no", forbids=(STACKS,))

    looks = (("hang", hang), ("fail", fail), ("well", well), ("no", no), ("none", lambda _: None))
    found = examine(AROUND, [Check(name, "all", look) for name, look in looks], deadline_s=0.3)
    release.set()
    told = {line.name: line.finding.told for line in found.lines}
    assert list(told) == ["hang", "fail", "well", "no"]
    assert told["hang"] == "did not finish within 0.3 s"
    assert "KeyError: 'oops'" in told["fail"]
    assert found.possible(SPANS)
    assert not found.possible(STACKS)
    assert found.because(STACKS) == ["no"]


def test_kernels_are_possible_where_the_model_s_call_is_a_stage(tmp_path: Path) -> None:
    """torch alone is not enough: a capture waits for `inference`, and would wait in vain."""
    import torch  # noqa: F401 - what the probe looks for

    recording = Recording(tmp_path)
    with closing(recording), RecorderReader(recording.path) as reader:
        probe = Probe(probe_of(recording.path), recording.recorder)
        try:
            around = Environment(tmp_path, (Served(recording.path, reader.process),))
            none_yet = gpu.torch(around)
            with recording.request(), stage("preprocess"):
                pass
            unmarked = gpu.torch(around)
            with recording.request(), stage("inference"):
                pass
            marked = gpu.torch(around)
        finally:
            probe.stop()
    assert [one.status for one in (none_yet, unmarked, marked)] == [WARN, WARN, OK]
    assert [one.gives for one in (none_yet, unmarked, marked)] == [(), (), (KERNELS,)]
    assert none_yet.do == ("send a request, then run this again",)
    assert "none of its requests opened the stage `inference`" in unmarked.told
