"""A client of one's own: its file joined with the agent's records, and what is wrong with a file."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stagescope import stage
from stagescope.agent.api.client import AgentClient
from stagescope.analysis.build import build_report
from stagescope.cli import main
from stagescope.errors import UsageError
from stagescope.load_run.client_file import read_client_file
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.types import Receive, Scope, Send
from stagescope.recorder.spool import RUNS_FOLDER, SOCKET_NAME
from stagescope.runfolder.run import read_run
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.serving import served

ROOT = Path(__file__).resolve().parents[2]
COUNT = 200
"""How many requests the documented client sends."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, with a stage in it."""
    await receive()
    with stage("inference"):
        body = b"ok"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class Sent:
    """A run that the client of docs/own-client.md has sent: its id, spool, and file."""

    run_id: str
    spool: Path
    file: Path
    url: str

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that it wrote."""
        return [json.loads(line) for line in self.file.read_text().splitlines()]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    """A server, its agent, and what the documented client sent to it."""
    tmp_path, printed = tmp_path_factory.mktemp("client"), io.StringIO()
    with (
        short_spool() as spool,
        AgentProcesses() as agents,
        served(StageMiddleware(app, spool=spool), lifespan="off") as port,
    ):
        agents(spool, "--samplers", "off")
        url = f"http://127.0.0.1:{port}/predict?secret=1"
        with redirect_stdout(printed):
            assert main(["runs", "open", "--spool", str(spool)]) == 0
        run_id = printed.getvalue().strip()
        assert (spool / RUNS_FOLDER / f"{run_id}.open").exists()
        script = tmp_path / "client.py"
        (block,) = re.findall(
            r"```python\n(.*?)```", (ROOT / "docs/own-client.md").read_text(), re.DOTALL
        )
        script.write_text(block)
        written = subprocess.run(
            [sys.executable, str(script), url, run_id], check=True, capture_output=True, text=True
        )
        file = tmp_path / "requests.jsonl"
        file.write_text(written.stdout)
        client = AgentClient(spool / SOCKET_NAME)
        wait_until(lambda: client.run_counts(run_id).finished == COUNT, timeout_s=20)
        yield Sent(run_id, spool, file, url)


def report_on(sent: Sent, file: Path, out: Path, *more: str) -> int:
    """Run `stagescope report` on a file of the client's."""
    places = ["--spool", str(sent.spool), "--out", str(out), *more]
    return main(["report", "--full", "--client-file", str(file), "--run", sent.run_id, *places])


def test_the_documented_client_is_joined_with_the_agents_records(
    sent: Sent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request meets its record on one clock, the parts sum up, and the run is closed."""
    assert report_on(sent, sent.file, tmp_path / "run", "--url", sent.url) == 0

    told = capsys.readouterr()
    report = build_report(tmp_path / "run")
    assert not (sent.spool / RUNS_FOLDER / f"{sent.run_id}.open").exists()
    assert report.valid, report.invalid_reasons
    assert (report.join.requests, report.join.one_clock) == (COUNT, COUNT)
    assert report.join.by == "trace_id+parent_span_id"
    assert report.total is not None
    total = sum(part.mean_ms for part in report.parts)
    assert total == pytest.approx(report.total.mean_ms, abs=1e-3)
    inference = report.part("inference")
    assert inference is not None
    assert inference.mean_ms > 0
    assert "requests of requests.jsonl" in told.out
    assert "secret" not in told.out + (tmp_path / "run/run.json").read_text()
    assert re.search(r"^client wait +– ", told.out, re.MULTILINE), told.out
    assert re.search(r"– dropped, –\s+overwritten", told.out), told.out
    assert read_run(tmp_path / "run").plan.rate_per_s is None


def as_csv(rows: list[dict[str, Any]], file: Path) -> None:
    """Write what k6 knows: ISO times and milliseconds, as CSV."""
    began = datetime(2026, 1, 31, 12, tzinfo=UTC)
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["traceparent", "sent", "first_byte_ms", "last_byte_ms", "status", "vu"])
        for row in rows:
            at = began + timedelta(microseconds=row["sent_ns"] // 1000 % 10**9)
            writer.writerow(
                [
                    f"00-{row['trace_id']}-{row['span_id']}-01",
                    at.isoformat(),
                    (row["first_byte_ns"] - row["sent_ns"]) / 1e6,
                    (row["last_byte_ns"] - row["sent_ns"]) / 1e6,
                    row["status"],
                    "7",
                ]
            )


def as_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    """Write Unix times as Parquet."""
    keys = ("sent_ns", "first_byte_ns", "last_byte_ns")
    shifted = [row | {key: row[key] + 1_700_000_000 * 10**9 for key in keys} for row in rows]
    pq.write_table(pa.Table.from_pylist(shifted), file)


def as_another_hosts(rows: list[dict[str, Any]], file: Path) -> None:
    """Write monotonic times of a host that was started an hour later."""
    keys = ("sent_ns", "first_byte_ns", "last_byte_ns")
    file.write_text(
        "".join(
            json.dumps(row | {key: row[key] + 3600 * 10**9 for key in keys}) + "\n" for row in rows
        )
    )


@pytest.mark.parametrize(
    ("write", "name"),
    [(as_csv, "k6.csv"), (as_parquet, "own.parquet"), (as_another_hosts, "other.jsonl")],
    ids=["iso-csv", "unix-parquet", "other-monotonic"],
)
def test_times_of_another_clock_are_joined_as_two_clocks(
    write: Callable[[list[dict[str, Any]], Path], None],
    name: str,
    sent: Sent,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Latency is the client's, each request meets its record, and network is not split."""
    file = tmp_path / name
    write(sent.rows(), file)

    assert report_on(sent, file, tmp_path / "run", "--format", "json") == 0

    report = json.loads(capsys.readouterr().out)
    mean_ms = sum(r["last_byte_ns"] - r["sent_ns"] for r in sent.rows()) / COUNT / 1e6
    assert (report["join"]["requests"], report["join"]["one_clock"]) == (COUNT, 0)
    assert report["total"]["mean_ms"] == pytest.approx(mean_ms, abs=0.002)
    assert read_run(tmp_path / "run").host.boot_id == ""


def test_requests_of_another_run_are_no_match(
    sent: Sent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is joined, the run is INVALID with exit code 2, and both sides are counted."""
    file = tmp_path / "other.jsonl"
    file.write_text(
        "".join(
            json.dumps(row | {"trace_id": f"{seq + 1:032x}"}) + "\n"
            for seq, row in enumerate(sent.rows())
        )
    )

    assert report_on(sent, file, tmp_path / "run") == 2

    told = capsys.readouterr()
    assert "INVALID" in told.out
    assert f"{COUNT} records that name this run are of requests that it did not send" in told.err


def test_half_of_the_requests_in_timeout_make_the_run_invalid(sent: Sent, tmp_path: Path) -> None:
    """Percentiles of the answered alone would hide them."""
    file = tmp_path / "late.jsonl"
    late = [
        {key: row[key] for key in ("trace_id", "sent_ns", "last_byte_ns")} | {"error": "timeout"}
        for row in sent.rows()[::2]
    ]
    answered = sent.rows()[1::2]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*late, *answered]))

    assert report_on(sent, file, tmp_path / "run") == 2

    reasons = read_run(tmp_path / "run").invalid_reasons
    assert any("100 of 200 requests (50.0%) reached their timeout" in why for why in reasons)


GOOD = {"trace_id": "1" * 32, "sent_ns": 10, "last_byte_ns": 20, "status": 200}


def without(name: str) -> dict[str, Any]:
    """Return a good row that lacks one field."""
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": 7, "latency": 3}, "line 1: it has no trace_id (nor traceparent), only id, latency"),
        (GOOD | {"trace_id": "0" * 32}, "32 hexadecimal digits"),
        (without("trace_id") | {"traceparent": "00-12-34-01"}, "traceparent is '00-12-34-01'"),
        (without("sent_ns"), "it has no sent time"),
        (without("sent_ns") | {"sent": "2026-01-31T12:00:00"}, "ISO 8601 time with its offset"),
        (without("last_byte_ns"), "it has no end"),
        (without("last_byte_ns") | {"last_byte_ms": "soon"}, "last_byte_ms is 'soon'"),
        (GOOD | {"last_byte_ns": 5}, "last_byte is 0.000 ms before sent"),
        (GOOD | {"sent_ns": 1.5}, "sent_ns is 1.5: a whole number"),
        (GOOD | {"sent_ns": -1}, "sent_ns is -1: a whole number"),
        (without("status"), "it has neither status nor error"),
        (GOOD | {"status": "OK"}, "status is 'OK': a whole number"),
        (GOOD | {"phase": "rampup"}, "phase is 'rampup': measure or warmup"),
        ([1, 2], "line 1 is not a JSON object"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_line(
    row: Any, said: str, tmp_path: Path
) -> None:
    """Nothing is left out in silence."""
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=re.escape(said)):
        read_client_file(file)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "ends in .jsonl, .ndjson, .csv, .parquet"),
        ("a.jsonl", "", "holds no request"),
        ("a.jsonl", "not json\n", "line 1 is not a JSON object: 'not json"),
        ("a.parquet", "not parquet", "cannot be read: Parquet"),
        ("a.csv", "trace_id,sent_ns\n" + "1" * 32 + ",5\n", "line 2: it has no end"),
        ("a.jsonl", (json.dumps(GOOD) + "\n") * 2, "line 2: its trace id is that of line 1"),
        (
            "a.jsonl",
            f"{json.dumps(GOOD)}\n"
            + json.dumps(
                {
                    "trace_id": "2" * 32,
                    "sent": "2026-01-31T12:00:00Z",
                    "last_byte_ms": 3,
                    "status": 200,
                }
            ),
            "times of two clocks",
        ),
    ],
    ids=["suffix", "empty", "text", "no-parquet", "csv-columns", "one-trace-twice", "two-clocks"],
)
def test_a_file_that_is_not_usable_is_one_sentence(
    name: str, content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with 2, names the file and writes nothing."""
    file, out = tmp_path / name, tmp_path / "run"
    file.write_text(content)
    asked = ["report", "--client-file", str(file), "--run", "r-1", "--out", str(out)]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert str(file) in told
    assert said in told
    assert told.count("\n") == 1
    assert not out.exists()


def test_a_missing_file_and_a_bad_id_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are named; nothing is asked of an agent."""
    missing = str(tmp_path / "none.jsonl")
    assert main(["report", "--client-file", missing, "--run", "r-1"]) == 2
    assert main(["report", "--client-file", missing, "--run", "a b/c"]) == 2
    assert main(["report", "--client-file", missing]) == 2
    assert main(["runs", "open", "a b/c"]) == 2
    assert main(["runs", "close"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2].strip()[:20] for line in told] == [
        f"{missing} cannot be read"[:20],
        "'a b/c' is no run id"[:20],
        "give --client-file F",
        "'a b/c' is no run id"[:20],
        "give the id of the r",
    ]


def test_runs_open_without_an_agent_says_what_to_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exit code 1, and no id is printed."""
    monkeypatch.setenv("STAGESCOPE_SPOOL", str(tmp_path))
    monkeypatch.setattr("stagescope.load_run.locate.default_spools", lambda: ())
    assert main(["runs", "open"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert f"no agent is in {tmp_path}: start `stagescope agent`" in told.err
