"""The table as a person sees it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Report
from stagescope.analysis.resources.model import StageUse
from stagescope.analysis.table import bar, render, side_by_side, what_grew
from tests.support.planted_run import planted_run
from tests.support.runs import (
    MS,
    batch_row,
    client_row,
    example_run,
    failed_row,
    server_row,
    write_run_folder,
)

GOLDEN = """\
GET http://127.0.0.1:8000/predict
rate        10.0/s asked (constant), 10.0/s answered, over 10.0 s
requests    121 measured, 120 answered, 120 of 2xx
errors      1: refused 1
server      agent; 120 requests joined by trace_id+parent_span_id; one clock

part, ms           mean      p50      p95      p99   share       slowest 1 %
client wait       1.000    1.000    1.000    1.000    5.0% ▎        5.0% ▎
connect           1.000    1.000    1.000    1.000    5.0% ▎        5.0% ▎
network           7.000    7.000    7.000    7.000   35.0% █▊      35.0% █▊
  request         1.000    1.000    1.000    1.000    5.0% ▎        5.0% ▎
  response        6.000    6.000    6.000    6.000   30.0% █▌      30.0% █▌
queue             3.000    3.000    3.000    3.000   15.0% ▊       15.0% ▊
  batch           2.000    2.000    2.000    2.000   10.0% ▌       10.0% ▌
preprocess            –        –        –        –       –             –
batch                 –        –        –        –       –             –
inference         6.000    6.000    6.000    6.000   30.0% █▌      30.0% █▌
postprocess           –        –        –        –       –             –
respond               –        –        –        –       –             –
tokenize          1.000    1.000    1.000    1.000    5.0% ▎        5.0% ▎
other             1.000    1.000    1.000    1.000    5.0% ▎        5.0% ▎
unexplained       0.000    0.000    0.000    0.000    0.0%          0.0%
────────────── ──────── ──────── ──────── ──────── ─────── ───── ─────── ─────
client latency   20.000   20.000   20.000   20.000  100.0% █████  100.0% █████
– unknown: no mark or hook recorded preprocess, batch, postprocess, respond;
time spent there is in another row (see docs/python-api.md for marks)

batches     1, 0 failed; size mean 4.0, p50 4, max 4; mean wait 1.000 ms,
            collate 0.500 ms, inference 6.000 ms
unmatched   1 of the client's (1 never sent, 0 failed, 0 answered), 0 of the
            server's
instrument  5.0 µs a request (4.0 stages), 0 dropped, 0 overwritten; the server
            went on for 0.000 ms after the last byte
"""


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Return the report of 120 like requests."""
    client = [client_row(seq) for seq in range(120)]
    stages = {"queue": MS, "queue.batch": 2 * MS, "inference": 6 * MS, "tokenize": MS}
    server = [server_row(row, stages, other_ns=MS) for row in client]
    batch = batch_row(
        0, size=4, start_ns=2000 * MS, batch__wait=MS, batch__collate=MS // 2, inference=6 * MS
    )
    folder = write_run_folder(tmp_path, [*client, failed_row(120, "refused")], server, [batch])
    return build_report(folder)


def text(renderable: RenderableType, width: int = 80) -> str:
    """Render as a pipe would get it, less trailing blanks."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return re.sub(r" +$", "", capture.get(), flags=re.MULTILINE)


def at_rate(report: Report, rate: float, **means: float) -> Report:
    """Return *report* at another rate, with other means of some parts."""
    parts = tuple(replace(p, mean_ms=means.get(p.name, p.mean_ms)) for p in report.parts)
    assert report.total is not None
    return replace(
        report,
        parts=parts,
        total=replace(report.total, mean_ms=sum(part.mean_ms for part in parts)),
        run=replace(report.run, plan=replace(report.run.plan, rate_per_s=rate)),
    )


def test_the_table(report: Report) -> None:
    """Head, table and foot fit 80 columns, and the means add up by eye."""
    assert text(render(report)) == GOLDEN


def test_an_invalid_run_says_so_first(report: Report) -> None:
    """An INVALID run's banner comes before any figure, with its reasons as they are."""
    lines = text(render(replace(report, invalid_reasons=("[bold]late", "few")))).splitlines()

    assert lines[0].startswith("INVALID")
    assert lines[1:3] == ["  - [bold]late", "  - few"]


def test_a_run_without_answers_has_no_table(tmp_path: Path) -> None:
    """Where nothing was answered the errors stand, and a sentence in the table's place."""
    folder = write_run_folder(tmp_path, [failed_row(seq, "reset") for seq in range(5)])

    screen = text(render(build_report(folder)))

    assert "errors      5: reset 5" in screen
    assert "No request was answered" in screen


def test_server_timing_is_told(tmp_path: Path) -> None:
    """The head says where the header's times end; what it does not tell is unknown, never 0."""
    client = client_row(0)
    server = server_row(client, {"inference": MS}) | {"source": "server-timing", "boot_id": ""}
    run = example_run(server_source="server-timing", instrument={})

    screen = text(render(build_report(write_run_folder(tmp_path, [client], [server], run=run))))

    assert "until the response began" in screen
    assert re.search(r"^queue +–", screen, re.MULTILINE)
    assert re.search(r"^batch +–", screen, re.MULTILINE)
    assert "an agent on the server's host knows more" in " ".join(screen.split())
    assert re.search(r"^instrument +– \(only an agent knows", screen, re.MULTILINE)


def test_no_colour_when_piped_or_asked(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no escape code in a pipe, and no colour under NO_COLOR."""
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=80, force_terminal=True)
    with console.capture() as capture:
        console.print(render(report))

    assert "\x1b" not in text(render(report))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", capture.get())


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, "    "), (0.5, "██  "), (1, "████"), (2, "████"), (-1, "    ")]
)
def test_bar(share: float, drawn: str) -> None:
    """A bar is as long as its share, within its cells."""
    assert bar(share, 4) == drawn


def test_side_by_side(report: Report) -> None:
    """Three runs stand beside each other in 80 columns, each step with what grew."""
    middle, top = at_rate(report, 20.0, queue=9.0), at_rate(report, 40.0, queue=900.0)

    screen = text(side_by_side([report, middle, replace(top, invalid_reasons=("late",))]))

    assert max(len(line) for line in screen.splitlines()) <= 80
    assert re.search(
        r"^queue +3\.000 +3\.000 +9\.000 +3\.000 +900\.000 +3\.000$", screen, re.MULTILINE
    )
    assert re.search(r"^client latency +20\.000 .* 917\.000 ", screen, re.MULTILINE)
    assert "INVALID at 40/s: late" in screen
    assert "10/s → 20/s: queue grew most, from 3.000 to 9.000 ms" in screen


def test_what_grew(report: Report) -> None:
    """The part whose mean grew most in ms is named with before, after and the whole."""
    after = at_rate(report, 20.0, queue=13.0, inference=8.0, network=2.0)

    assert what_grew(report, after) == (
        "10/s → 20/s: queue grew most, from 3.000 to 13.000 ms "
        "(+10.000 ms; client latency +7.000 ms)"
    )


def test_nothing_grew(report: Report) -> None:
    """Where no part grew, or a run has no table, that is what is said."""
    assert what_grew(report, at_rate(report, 5.0)) == "10/s → 5/s: no part grew"
    assert "nothing to compare" in what_grew(report, replace(report, total=None))


USED = """\
what each stage used, over 12.0 s

stage          CPU s     ± device s GPU busy GPU mem    RSS lag ms GC ms
queue           0.00 ±0.03        -      10% 20.0 GB 111 MB   5.00     -
preprocess      3.00 ±0.30        -      10% 20.0 GB 111 MB      -     -
  parse         3.00 ±0.30        -      10% 20.0 GB 111 MB      -     -
inference       1.80 ±0.27     4.00      80% 20.0 GB 111 MB      -  2.00
no stage        1.20 ±0.24        -        -       -      -      -     -
total           6.00

top stacks (samples of the stage, share of them)
preprocess     50  80% hot (app/server.py:41)
                   20% cold (app/server.py:50)
inference      50  60% predict (app/server.py:60) → forward
                   40% waits: predict (app/server.py:60) → forward
no stage       20 100% main (app/server.py:1) → select

top kernels (share of the stage's busy time)
inference           launch-bound: busy 40% of 20.0 ms captured
                75% void gemm_bf16_128x128_32x3_tn_align8<cutlass… 48 in 6.00 ms
                25% Memcpy HtoD (Pageable -> Device)                2 in 2.00 ms
"""
LINES = """\
CPU         6.00 s in 1 process, 0.50 of a core; split by 100 running stack
            samples of py-spy, ± one standard error; stage known by: marker 70%,
            none 20%, block 10%
device      4.00 s; 90.0% of the work has a device time
GPU         means over the driver's windows of 0.01 s, never a request's
memory      RSS 100 MB at first, 122 MB at last
streams     120; between chunks mean 10.000 ms, p99 of their means 10.000 ms,
            longest 13.000 ms
collectors  0.20% of a core: host 0.02 s
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Return the report of the planted run."""
    return build_report(planted_run(tmp_path_factory.mktemp("planted")))


def test_what_each_stage_used(planted: Report) -> None:
    """The second table, what ran and the lines at the foot fit 80 columns."""
    screen = text(render(planted))

    assert USED in screen
    assert screen.endswith(LINES)
    assert max(len(line) for line in screen.splitlines()) <= 80


def test_docs_show_that_table() -> None:
    """docs/report.md shows what is printed."""
    page = Path(__file__).parents[2] / "docs" / "report.md"

    assert USED in page.read_text("utf-8")


def test_a_column_without_a_figure_is_absent(planted: Report) -> None:
    """Where only stalls are known, there is no column for what was not measured."""
    used = planted.resources
    assert used is not None
    bare = tuple(StageUse(each.stage, stalls_s=each.stalls_s) for each in used.stages)
    few = replace(used, stages=bare, cpu=None, device=None, gpu_window_s=None, streams=None)

    screen = text(render(replace(planted, resources=few)))

    assert re.search(r"^stage +lag ms GC ms$", screen, re.MULTILINE)
    assert "CPU" not in screen
    assert "top" not in screen


def test_a_stage_of_its_neighbours_is_marked(planted: Report) -> None:
    """A stage shorter than the driver's windows bears a mark, which a line explains."""
    used = planted.resources
    assert used is not None
    coarse = tuple(replace(each, gpu_coarse=True) for each in used.stages)

    screen = text(render(replace(planted, resources=replace(used, stages=coarse))), 200)

    assert " ~80% " in screen
    assert "~ the stage fills less than half of its windows" in screen


def test_cpu_without_stacks_says_so(planted: Report) -> None:
    """A total that could not be shared out is told as such."""
    used = planted.resources
    assert used is not None
    assert used.cpu is not None
    alone = replace(used, cpu=replace(used.cpu, samples=0))

    assert "not split by stage: no stack of these" in text(
        render(replace(planted, resources=alone)), width=200
    )


def test_profiled_requests_are_counted_in_the_head(report: Report) -> None:
    """The head says how many answered requests are in no figure."""
    screen = text(render(replace(report, client=replace(report.client, profiled=3))), 200)

    assert "3 profiled by a capture, in no figure below" in screen
