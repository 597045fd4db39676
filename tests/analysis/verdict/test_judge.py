"""The verdict on runs that bear none, and on such as bear one: never a confident wrong answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Report
from stagescope.analysis.verdict.judge import judge
from stagescope.analysis.verdict.model import (
    CAUSES,
    CONTRIBUTING,
    HOLDS,
    KINDS,
    UNDETERMINED,
    Evidence,
    Finding,
    GroupFacts,
    WaitFacts,
)
from stagescope.analysis.verdict.rules_outside import RULES
from stagescope.analysis.verdict.steps import STEPS
from tests.support.runs import (
    MS,
    client_row,
    example_run,
    failed_row,
    server_row,
    write_run_folder,
)

DOC = Path(__file__).parents[3] / "docs" / "verdicts.md"
STAGES = {"preprocess": 2 * MS, "inference": 15 * MS}


def folder_of(folder: Path, count: int = 120, **changes: Any) -> Path:
    """Write a run of like requests; *changes* of `run.json`."""
    client = [client_row(seq) for seq in range(count)]
    server = [server_row(row, STAGES) for row in client]
    return write_run_folder(folder, client, server, run=example_run(**changes))


def named_undetermined(report: Report, *words: str) -> None:
    """Assert that the verdict is undetermined, says why, and what to do."""
    verdict = report.verdict
    assert (verdict.kind, verdict.confidence) == (UNDETERMINED, "low")
    for word in words:
        assert word in verdict.evidence[0]
    assert verdict.next_steps
    assert all(rival.status != HOLDS for rival in verdict.rivals)


def test_every_kind_has_a_rule_steps_and_a_section() -> None:
    """The closed list of kinds is that of the rules, of the steps and of the page."""
    page = DOC.read_text("utf-8")

    assert len(RULES) == len(CAUSES)
    assert set(STEPS) == set(KINDS)
    for kind in KINDS:
        assert f"\n## {kind}\n" in page


def test_without_a_servers_side(tmp_path: Path) -> None:
    """A run that no agent joined says so, and how to get the other side."""
    client = [client_row(seq) for seq in range(120)]
    run = example_run(server_source="none")

    report = build_report(write_run_folder(tmp_path, client, run=run))

    named_undetermined(report, "stagescope agent")


def test_one_request(tmp_path: Path) -> None:
    """One request is too few, and the verdict says how many more it takes."""
    named_undetermined(build_report(folder_of(tmp_path, count=1)), "1 requests", "29 more")


def test_only_failures(tmp_path: Path) -> None:
    """Where nothing was answered there is no time to judge; the errors stand as evidence."""
    folder = write_run_folder(tmp_path, [failed_row(seq, "refused") for seq in range(120)])

    report = build_report(folder)

    named_undetermined(report, "no request was answered")
    assert "refused 120" in report.verdict.evidence[1]


def test_only_errors_of_the_server(tmp_path: Path) -> None:
    """Where every answer is a 500, the times are those of errors."""
    client = [client_row(seq, status=500) for seq in range(120)]
    server = [server_row(row, STAGES) for row in client]

    report = build_report(write_run_folder(tmp_path, client, server))

    named_undetermined(report, "no request succeeded")
    assert any(
        rival.kind == "errors" and rival.status == CONTRIBUTING for rival in report.verdict.rivals
    )


def test_an_invalid_run(tmp_path: Path) -> None:
    """An INVALID run bears no verdict, and gives its reason."""
    report = build_report(folder_of(tmp_path, invalid_reasons=("server side incomplete",)))

    named_undetermined(report, "INVALID", "server side incomplete")


def test_a_late_driver_is_the_client(tmp_path: Path) -> None:
    """A run that is INVALID since its driver was late says that the client held it back."""
    reasons = ("driver late: it used 99% of a core (uvloop event loop): lower the rate",)

    driver = {"planned": 120.0, "sent": 120.0, "late_p99_ms": 12.0, "cpu_share": 0.99}

    report = build_report(folder_of(tmp_path, invalid_reasons=reasons, driver=driver))

    assert report.verdict.kind == "client"


def test_a_driver_that_others_kept_from_a_core_is_not_what_holds_the_server_back(
    tmp_path: Path,
) -> None:
    """It was late, but hardly used a core and hardly added to latency: the run is INVALID, no more."""
    reasons = ("driver late: 1 % of requests were taken up more than 10.4 ms after plan",)
    driver = {"planned": 120.0, "sent": 120.0, "late_p99_ms": 10.4, "cpu_share": 0.03}

    report = build_report(folder_of(tmp_path, invalid_reasons=reasons, driver=driver))

    named_undetermined(report, "INVALID", "driver late")


def test_clocks_an_hour_apart(tmp_path: Path) -> None:
    """Where the server's stamps, said to be of the same clock, are an hour off, nothing is judged."""
    hour = 3600 * 1_000_000_000
    client = [client_row(seq) for seq in range(120)]
    server = [server_row(row, STAGES) for row in client]
    server = [row | {"start_ns": row["start_ns"] + hour} for row in server]

    report = build_report(write_run_folder(tmp_path, client, server))

    named_undetermined(report, "clock")


def test_mixed_endpoints(tmp_path: Path) -> None:
    """A stage's own time, mixed of two endpoints, is no verdict on either."""
    found = evidence(tmp_path)
    fast, slow = ("/fast", 100, 2.0), ("/slow", 20, 90.0)
    routes = tuple(GroupFacts(*group) for group in (slow, fast))

    verdict = judge(
        replace(found, routes=routes), [lambda e: Finding("dependency", HOLDS, "outside", 15.0)]
    )

    assert verdict.kind == UNDETERMINED
    assert "/slow takes 90.0 ms" in verdict.evidence[0]


def evidence(folder: Path) -> Evidence:
    """Return the evidence of a run of like requests."""
    found = build_report(folder_of(folder)).evidence
    assert found is not None
    return found


def test_waits_that_nobody_measured_are_named(tmp_path: Path) -> None:
    """Without the facts of waits a run is undetermined, and names the command that gets them."""
    report = build_report(folder_of(tmp_path))

    named_undetermined(report, "waits were not measured")
    assert any("stagescope agent" in missing for missing in report.verdict.untested)


def test_samples_of_half_the_run_are_no_ground(tmp_path: Path) -> None:
    """With samples of less than the run, who took the cores is untestable, not guessed."""
    found = evidence(tmp_path)
    host = replace(found.host, busy_cores=2.0, server_cores=0.3, sampled_share=0.4)
    wait = WaitFacts("cpu", 12.0, 12.0, 15.0, 15.0, 12.0, 12.0)
    verdict = judge(replace(found, host=host, waits=(wait,), loop_busy=0.2))

    assert verdict.kind not in ("host", "cpu")
    assert {r.kind for r in verdict.rivals if r.status == "untestable"} >= {"host", "cpu"}
    assert verdict.confidence != "high"


@pytest.mark.parametrize("kind", ["licence-server", "event-loop"])
def test_a_rule_of_the_users_own(tmp_path: Path, kind: str) -> None:
    """A rule that a package brings is judged like ours; its kind may be a word of its own."""
    found = evidence(tmp_path)

    verdict = judge(found, [lambda e: Finding(kind, HOLDS, "it waited", e.mean_ms)])

    assert verdict.kind == kind
    assert verdict.evidence[0] == "it waited"


def said_of(e: Evidence, kind: str) -> Finding:
    """Return what the rules say of one kind."""
    return next(one for one in (rule(e) for rule in RULES) if one.kind == kind)


def test_short_waits_for_a_core_on_an_idle_machine_are_not_its_limit(tmp_path: Path) -> None:
    """Threads that collide for a moment wait; cores hold a server back that uses them."""
    waited = WaitFacts("cpu", 40.0, 40.0, 60.0, 60.0, 40.0, 40.0)
    e = replace(evidence(folder_of(tmp_path)), waits=(waited,), loop_busy=0.1)

    said = {
        used: said_of(
            replace(
                e,
                host=replace(
                    e.host, cores=2, busy_cores=used + 0.1, server_cores=used, driver_cores=0.0,
                    agent_cores=0.0, sampled_share=1.0, cgroup_limit=None,
                ),
            ),
            "cpu",
        ).status
        for used in (0.2, 1.6)
    }  # fmt: skip

    assert said == {0.2: CONTRIBUTING, 1.6: HOLDS}


def test_a_large_response_that_is_taken_slowly_is_its_readers_doing(tmp_path: Path) -> None:
    """Bytes in both directions take long on a slow network; a slow reader delays answers alone."""
    e = replace(
        evidence(folder_of(tmp_path)), mean_ms=250.0, slowest_ms=300.0, loop_busy=0.1,
        one_clock=True, response_bytes=3e6,
    )  # fmt: skip
    reader = replace(e, parts={"network": 230.0, "network.request": 1.0, "network.response": 229.0})
    slow = replace(e, parts={"network": 230.0, "network.request": 110.0, "network.response": 120.0})
    short = replace(reader, response_bytes=800.0)

    assert said_of(reader, "slow-reader").status == HOLDS
    assert "13 MB/s" in said_of(reader, "slow-reader").why
    assert said_of(reader, "network").status != HOLDS
    for one in (slow, short):
        assert said_of(one, "network").status == HOLDS
        assert said_of(one, "slow-reader").status != HOLDS


def test_time_that_goes_with_sizes_is_the_workloads(tmp_path: Path) -> None:
    """A stage that only waits looks like a dependency; if sizes explain it, the requests differ."""
    e = evidence(folder_of(tmp_path))
    outside = Finding("dependency", HOLDS, "waits", 27.0, 90.0)

    def chosen(explained_ms: float) -> str:
        sizes = Finding("workload", HOLDS, "differ", explained_ms, 90.0)
        both = replace(e, mean_ms=31.0, slowest_ms=90.0, loop_busy=0.1)
        return judge(both, [lambda _: outside, lambda _: sizes]).kind

    assert (chosen(19.0), chosen(5.0)) == ("workload", "dependency")
