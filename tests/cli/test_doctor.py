"""`stagescope doctor` as people run it: real processes in several planted surroundings."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stagescope.agent.lock import AGENT, try_hold
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses

CHECKS = [
    "python", "spool", "agent", "servers", "processes", "cpus", "cgroup", "pressure", "clock",
    "py-spy", "ptrace", "nvidia", "cupti", "torch", "metrics", "otlp", "load", "own cost",
    "settings",
]  # fmt: skip
"""`counters` comes where there is an NVIDIA driver."""
SERVED = """
import sys, pathlib
from stagescope.middleware.process import process_recorder
recorder = process_recorder(pathlib.Path(sys.argv[1]), "served")
print(recorder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool of the test's own."""
    with short_spool() as made:
        yield made


def doctor(
    spool: Path, *words: str, environment: Mapping[str, str] | None = None, python: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [python or sys.executable, "-m", "stagescope", "doctor", "--spool", str(spool), *words],
        env=os.environ | (environment or {}), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def examined(spool: Path, *words: str, **planted: Any) -> dict[str, Any]:
    """Run it for machines; give its JSON with the checks by name."""
    done = doctor(spool, *words, "--format", "json", **planted)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return {
        **found,
        "code": done.returncode,
        "by_name": {one["name"]: one for one in found["checks"]},
    }


@contextmanager
def serving(spool: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that records into *spool* and has a probe."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVED, str(spool)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A planted /proc: of a container, without capabilities, with Yama at 1 and without PSI."""
    root = tmp_path / "root"
    own = root / "proc" / "self"
    own.mkdir(parents=True)
    (own / "stat").write_text("1 (python) S")
    (own / "status").write_text("Uid:\t0\t0\t0\t0\nNSpid:\t7\nCapEff:\t00000000a80425fb\n")
    (own / "mounts").write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\ntmpfs / tmpfs rw 0 0\n")
    (own / "mountinfo").write_text("31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (own / "cgroup").write_text("0::/pod/box\n")
    yama = root / "proc" / "sys" / "kernel" / "yama"
    yama.mkdir(parents=True)
    (yama / "ptrace_scope").write_text("1\n")
    (root / ".dockerenv").touch()
    group = root / "sys" / "fs" / "cgroup"
    (group / "pod" / "box").mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpu memory\n")
    for box in ("pod", "pod/box"):
        (group / box / "cgroup.events").touch()
    (group / "pod" / "cpu.max").write_text("50000 100000\n")
    (group / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    (group / "pod" / "box" / "memory.max").write_text("2000000000\n")
    return root / "proc"


def test_json_has_stable_keys(spool: Path) -> None:
    """The keys that docs/doctor.md names, each check once and in order, nothing else."""
    found = examined(spool)
    assert found["code"] == 0
    keys = {"schema", "spool", "pid", "measurable", "checks", "needed", "not_possible"}
    assert set(found) - {"code", "by_name"} == keys
    assert found["schema"] == 1
    assert list(found["measurable"]) == ["spans", "host", "stacks", "kernels", "gpu"]
    assert [name for name in found["by_name"] if name != "counters"] == CHECKS
    for one in found["checks"]:
        assert set(one) == {
            "name", "group", "status", "told", "do", "gives", "lacks", "forbids", "facts", "took_s",
        }  # fmt: skip
        assert one["status"] in {"ok", "warn", "no"}
        assert one["told"]
    for what, told in found["measurable"].items():
        assert told["possible"] == any(what in one["gives"] for one in found["checks"])


def test_the_screen_fits_a_terminal_and_is_plain_when_piped(spool: Path) -> None:
    """No colour codes, no line beyond 80 columns but commands to copy, a sign on each line."""
    done = doctor(spool)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("What can be measured here\n")
    long = [line for line in done.stdout.splitlines() if len(line) > 80]
    assert all(line.strip().startswith(("do: ", "or: ")) for line in long)
    assert len(done.stdout.splitlines()) <= 60
    plain = doctor(spool, environment={"PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0
    assert "+ spans" in plain.stdout


def test_need_gives_the_exit_code(spool: Path) -> None:
    """What is possible is exit code 0; what is not is named, with 1; no such thing is usage."""
    assert doctor(spool, "--need", "spans,host").returncode == 0
    done = doctor(spool, "--need", "spans,kernels")
    assert done.returncode == 1
    assert done.stdout.endswith("needed and not possible here: kernels\n")
    assert examined(spool, "--need", "kernels")["not_possible"] == ["kernels"]
    wrong = doctor(spool, "--need", "tea")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "stagescope doctor: --need tea: there is spans, host, stacks, kernels, gpu\n"
    )


def test_a_served_process_is_seen_and_read(spool: Path) -> None:
    """Its pid, service and Python; stacks by py-spy or from within; nothing of secrets."""
    with serving(spool) as process:
        found = examined(spool, "--need", "stacks,spans", environment={"SECRET": "hush"})
        (facts,) = found["by_name"]["servers"]["facts"]["processes"]
    assert found["code"] == 0
    assert (facts["pid"], facts["service"], facts["probe"]) == (process.pid, "served", "answers")
    assert found["by_name"]["servers"]["gives"] == ["stacks"]
    assert all(name.startswith("STAGESCOPE_") for name in facts["environment"])


def test_a_process_that_does_not_answer_cannot_hang_the_screen(spool: Path) -> None:
    """A stopped server: its probe is said to be silent, all other lines are there."""
    with serving(spool) as process:
        process.send_signal(signal.SIGSTOP)
        found = examined(spool)
        process.send_signal(signal.SIGCONT)
    assert list(found["by_name"])[: len(CHECKS[:4])] == CHECKS[:4]
    servers = found["by_name"]["servers"]
    assert servers["status"] == "warn"
    assert "its probe is silent" in servers["told"]
    assert "did not answer 'hello' within 1 s" in servers["told"]


def test_a_pid_that_is_not_here(spool: Path) -> None:
    """One sentence with what may be so and what to do, exit code 1."""
    done = doctor(spool, "--pid", "999999999")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no process 999999999 here" in done.stderr
    assert "shareProcessNamespace: true" in done.stderr


def test_a_process_that_is_not_python(spool: Path) -> None:
    """py-spy's answer is told as what it means, and stacks are not possible."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            found = examined(spool, "--pid", str(process.pid), "--need", "stacks")
        finally:
            process.kill()
    assert found["code"] == 1
    assert found["by_name"]["py-spy"]["status"] == "no"
    assert f"not on pid {process.pid}" in found["by_name"]["py-spy"]["told"]
    assert f"process {process.pid} does not record" in found["by_name"]["servers"]["told"]


def test_without_py_spy(spool: Path, tmp_path: Path) -> None:
    """An environment that has none: which package is missing; stacks then need a server."""
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    bare = str(tmp_path / "bare" / "bin" / "python")
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    planted = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{packages}"}
    found = examined(spool, "--need", "stacks", environment=planted, python=bare)
    line = found["by_name"]["py-spy"]
    assert (found["code"], line["status"]) == (1, "warn")
    assert line["do"] == [f"{bare} -m pip install py-spy"]
    with serving(spool):
        found = examined(spool, "--need", "stacks", environment=planted, python=bare)
    assert found["code"] == 0  # from within the server


def test_a_py_spy_that_is_refused(spool: Path, tmp_path: Path, proc: Path) -> None:
    """A py-spy that may not read: its own words in short, and the exact grants."""
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    program = tmp_path / "bare" / "bin" / "py-spy"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo py-spy 9.9 && exit\n'
        "echo Permission Denied: Try running again with elevated permissions >&2\nexit 1\n"
    )
    program.chmod(0o755)
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    planted = {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{packages}"}
    found = examined(
        spool, "--proc", str(proc), environment=planted, python=str(program.with_name("python"))
    )
    line = found["by_name"]["py-spy"]
    assert line["told"].startswith("py-spy does not work, tried on a child of our own: ")
    assert "does not let this user read process" in line["told"]
    assert line["do"][0] == "docker run --cap-add SYS_PTRACE"
    assert line["facts"]["version"] == "9.9"


def test_what_stands_in_the_way_of_py_spy_is_granted_exactly(spool: Path, proc: Path) -> None:
    """Yama at 1, no capability: the grant for Docker, for a pod, and for the host."""
    line = examined(spool, "--proc", str(proc))["by_name"]["ptrace"]
    assert line["status"] == "warn"
    assert "kernel.yama.ptrace_scope is 1 and CAP_SYS_PTRACE is missing" in line["told"]
    assert line["facts"] | {"uid": 0} == {
        "yama_ptrace_scope": 1, "cap_sys_ptrace": False, "container": "docker", "uid": 0,
        "owners": [], "same_pid_namespace": True,
    }  # fmt: skip
    assert line["do"] == [
        "docker run --cap-add SYS_PTRACE",
        'securityContext: {capabilities: {add: ["SYS_PTRACE"]}} (of the agent\'s container)',
        "sudo sysctl kernel.yama.ptrace_scope=0 (on the host)",
    ]
    planted = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    line = examined(spool, "--proc", str(proc), environment=planted)["by_name"]["ptrace"]
    assert line["do"][0].startswith("securityContext:")
    (proc / "self" / "status").write_text("Uid:\t0\nNSpid:\t7\nCapEff:\t000001ffffffffff\n")
    assert examined(spool, "--proc", str(proc))["by_name"]["ptrace"]["status"] == "ok"


def test_host_figures_as_planted(spool: Path, proc: Path) -> None:
    """No PSI, a quota of half a CPU from the group above ours, a memory limit."""
    found = examined(spool, "--proc", str(proc), "--sys", str(proc.parent / "sys"))["by_name"]
    assert found["pressure"]["status"] == "warn"
    assert found["pressure"]["do"] == ["boot with psi=1"]
    assert found["cpus"]["facts"]["quota"] == 0.5
    assert found["cgroup"]["facts"]["memory_max_bytes"] == 2_000_000_000
    assert found["cgroup"]["status"] == "ok"


def test_who_holds_the_gpus_profiling(spool: Path, proc: Path) -> None:
    """nsys beside us is a warning; a profiler inside the server forbids captures, by its name."""
    for pid, name, environ in ((41, "nsys", ""), (42, "python", "KINETO_USE_DAEMON=1\0A=b\0")):
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "comm").write_text(f"{name}\n")
        (proc / str(pid) / "environ").write_text(environ)
    (proc / "driver" / "nvidia").mkdir(parents=True)
    (proc / "driver" / "nvidia" / "params").write_text("RmProfilingAdminOnly: 1\n")
    found = examined(spool, "--proc", str(proc))["by_name"]
    assert found["cupti"]["status"] == "warn"
    assert "nsys pid 41 may hold CUPTI" in found["cupti"]["told"]
    assert "NVreg_RestrictProfilingToAdminUsers=0" in found["counters"]["do"][0]
    found = examined(spool, "--proc", str(proc), "--pid", "42")
    assert found["by_name"]["cupti"]["forbids"] == ["kernels"]
    assert "pid 42 from its start: KINETO_USE_DAEMON=1" in found["by_name"]["cupti"]["told"]
    assert "cupti" in found["measurable"]["kernels"]["lacking"]


def test_a_spool_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in its place, a folder that takes no files, a path too long for a socket."""
    (tmp_path / "file").touch()
    found = examined(tmp_path / "file", "--need", "spans")
    assert found["code"] == 1
    assert found["by_name"]["spool"]["told"].endswith("is a file, not a folder")
    found = examined(Path("/proc/self/stagescope"), "--need", "spans")
    assert found["code"] == 1
    assert "cannot be made in /proc" in found["by_name"]["spool"]["told"]
    found = examined(tmp_path / ("long" * 30))
    assert "a socket may have 107" in found["by_name"]["spool"]["told"]


def test_how_much_memory_a_worker_takes_is_told(spool: Path) -> None:
    """Of what is free where the spool is, and by how many requests its file holds."""
    line = examined(spool)["by_name"]["spool"]
    assert re.search(r"a worker's file takes \d+\.\d MB", line["told"])
    assert line["facts"]["records_per_file"] > 0
    assert line["facts"]["free_bytes"] > 0


def test_who_drains_the_spool(spool: Path) -> None:
    """Nobody; an agent that answers; a holder that does not, by its pid."""
    assert examined(spool)["by_name"]["agent"]["told"].startswith("none runs on this spool")
    with AgentProcesses() as start:
        process = start(spool)
        line = examined(spool)["by_name"]["agent"]
        assert line["status"] == "ok"
        assert line["facts"]["pid"] == process.pid
    hold = try_hold(spool, AGENT)
    assert hold is not None
    line = examined(spool)["by_name"]["agent"]
    hold.release()
    assert line["status"] == "no"
    assert f"held by agent pid {os.getpid()}, which does not answer" in line["told"]


def test_the_metrics_port_and_its_holder(spool: Path) -> None:
    """A port that is taken is told with who has it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        planted = {"OTEL_EXPORTER_PROMETHEUS_PORT": str(listener.getsockname()[1])}
        line = examined(spool, environment=planted)["by_name"]["metrics"]
    assert line["status"] == "warn"
    assert line["facts"]["holder"]["pid"] == os.getpid()
    assert f"pid {os.getpid()}" in line["told"]


def test_an_otlp_back_end(spool: Path) -> None:
    """One that listens, one that does not, and no password on any screen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        planted = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://me:hush@{where}/path?key=hush"}
        found = examined(spool, environment=planted)
        assert found["by_name"]["otlp"]["status"] == "ok"
        assert found["by_name"]["otlp"]["facts"]["endpoint"] == where
        assert "hush" not in json.dumps(found)
    line = examined(spool, environment=planted)["by_name"]["otlp"]
    assert line["status"] == "no"
    assert "does not listen" in line["told"]
