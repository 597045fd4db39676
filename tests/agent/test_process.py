"""`stagescope agent` as people run it: real processes, signals, SIGKILL, the lock."""

import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.agent.process import Settings, run_agent
from stagescope.errors import StagescopeError, UsageError
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.rings import write_ring


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


@pytest.fixture
def start_process() -> Iterator[AgentProcesses]:
    """Starts agents as processes, which are ended with the test."""
    with AgentProcesses() as start:
        yield start


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Signal an agent and give its exit code and what it printed."""
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    return process.returncode, out + err


def after(process: subprocess.Popen[str], words: str) -> str:
    """Read lines until one has *words*, and give what follows them; samplers say things too."""
    assert process.stdout
    lines = iter(process.stdout.readline, "")
    return next(line.partition(words)[2] for line in lines if words in line)


def test_a_second_agent_is_told_who_holds_the_spool(
    spool: Path, start_process: AgentProcesses
) -> None:
    """Exit code 3 and one sentence with spool, pid and time; the first one goes on."""
    first = start_process(spool)
    second = start_process(spool, answers=False)
    out, err = second.communicate(timeout=20)
    assert second.returncode == 3
    assert out == ""
    assert err.count("\n") == 1
    assert f"spool {spool} is held by agent pid {first.pid} (since 20" in err
    assert AgentClient(spool / "agent.sock").health()["pid"] == first.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(spool: Path, start_process: AgentProcesses, number: int) -> None:
    """It reads what is there, says who came and how much it read, and exits with 0."""
    with write_ring(spool / "a.ring", 3, run_id="run") as writer:
        process = start_process(spool)
        wait_until(lambda: AgentClient(spool / "agent.sock").run_counts("run").requests == 3)
        writer.request("run")
        code, printed = end(process, number)
    assert code == 0
    assert f"reading spool {spool}" in printed
    assert f"worker {os.getpid()} of test found" in printed
    assert "stopped: 4 records read" in printed
    assert not (spool / "agent.sock").exists()
    assert (spool / "runs" / "run.ndjson").read_text().count('"kind":"request"') == 4


def test_sigkill_neither_loses_nor_doubles_a_runs_records(
    spool: Path, start_process: AgentProcesses
) -> None:
    """Agents killed at any moment, one after the other: the run store has each record once."""
    client = AgentClient(spool / "agent.sock")
    with write_ring(spool / "a.ring", 0, ring_slots=4096) as writer:
        for round_number in range(1, 5):
            process = start_process(spool)
            for _ in range(300):
                writer.request("run")
            if round_number % 2:
                wait_until(lambda: client.run_counts("run").requests > 0)
            end(process, signal.SIGKILL)
        start_process(spool)
        records = list(client.run_records("run"))
    assert [record.seq for record in records] == list(range(1200))


def test_once_reads_what_is_there_and_ends(spool: Path, start_process: AgentProcesses) -> None:
    """`--once` drains, reports the dead, deletes their files, and exits with 0."""
    writer = write_ring(spool / "a.ring", 5, run_id="run")
    writer.begin(0, "run")
    writer.close()
    process = start_process(spool, "--once", answers=False)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "has exited, 1 requests in flight" in out
    assert "stopped: 6 records read" in out
    assert not writer.path.exists()


def test_tcp_and_metrics_say_where_they_are(spool: Path, start_process: AgentProcesses) -> None:
    """Port 0 picks one and prints it; the made token is printed, kept 0600, and works."""
    with write_ring(spool / "a.ring", 2, run_id="run"):
        process = start_process(spool, "--listen", "127.0.0.1:0", "--metrics-port", "0")
        token = (spool / "agent.token").read_text().strip()
        assert (spool / "agent.token").stat().st_mode & 0o777 == 0o600
        AgentClient(spool / "agent.sock").counters()
        told = after(process, "control API at ")
        api = told.partition(",")[0]
        metrics = after(process, "metrics at ").strip()
        assert token in told
        assert AgentClient(api, token).run_counts("run").requests == 2
        with urllib.request.urlopen(metrics, timeout=5) as response:
            assert b"http_server_request_duration_seconds" in response.read()
        code, printed = end(process)
    assert code == 0
    assert "stopped: 2 records read" in printed


def test_a_token_file_is_used(spool: Path, tmp_path: Path, start_process: AgentProcesses) -> None:
    """The token of --token-file opens the API and is not printed."""
    file = tmp_path / "token"
    file.write_text("a-secret-word\n")
    file.chmod(0o600)
    process = start_process(spool, "--listen", "127.0.0.1:0", "--token-file", str(file))
    api = after(process, "control API at ").partition(",")[0]
    assert AgentClient(api, "a-secret-word").health()["pid"] == process.pid
    with pytest.raises(StagescopeError, match="bearer token"):
        AgentClient(api, "another").health()
    _, printed = end(process)
    assert "a-secret-word" not in printed


def test_a_token_file_that_others_can_read_is_refused(spool: Path, tmp_path: Path) -> None:
    """The sentence says what to do."""
    file = tmp_path / "token"
    file.write_text("a-secret-word\n")
    file.chmod(0o644)
    settings = Settings(spool=spool, listen="127.0.0.1:0", token_file=file, metrics="off")
    with pytest.raises(UsageError, match=r"can be read by others \(mode 644\): chmod 600"):
        run_agent(settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(listen="8900"), "--listen 8900: give HOST:PORT"),
        (Settings(listen="host:99999"), "give HOST:PORT"),
        (Settings(listen="host:x"), "give HOST:PORT"),
        (Settings(metrics="everywhere"), "--metrics-port everywhere: give PORT or HOST:PORT"),
        (Settings(token_file=Path("x")), "--token-file is the token of --listen"),
    ],
)
def test_a_wrong_option_is_one_sentence(settings: Settings, sentence: str) -> None:
    """The sentence names the option; nothing was touched."""
    with pytest.raises(UsageError, match=sentence):
        run_agent(settings)


@pytest.mark.parametrize("content", [None, "", "two words", "\x01"])
def test_a_token_file_without_a_token_is_said(
    spool: Path, tmp_path: Path, content: str | None
) -> None:
    """Missing, empty, or more than a word: exit code 2 and the file's name."""
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=f"token file {file}"):
        run_agent(Settings(spool=spool, listen="127.0.0.1:0", token_file=file, metrics="off"))


def test_a_spool_that_cannot_be_is_said(tmp_path: Path) -> None:
    """A spool that is a file, or cannot be made, is one sentence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StagescopeError, match=f"spool {tmp_path}/file is a file"):
        run_agent(Settings(spool=tmp_path / "file"))
    with pytest.raises(StagescopeError, match=r"cannot be made"):
        run_agent(Settings(spool=Path("/proc/nowhere/spool")))


def test_a_missing_spool_is_made_for_its_owner_alone(spool: Path) -> None:
    """A spool that is not there yet is made 0700."""
    assert run_agent(Settings(spool=spool / "new", metrics="off", once=True)) == 0
    assert (spool / "new").stat().st_mode & 0o777 == 0o700
    for name in ("agent.lock",):
        assert (spool / "new" / name).stat().st_mode & 0o777 == 0o600
