"""The partition of client latency: exact to the nanosecond, whatever the clocks say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stagescope.analysis.breakdown import slots, split
from stagescope.analysis.join import find_spans, pair
from stagescope.analysis.sources import open_run, rows
from stagescope.stages import SUB_STAGES
from tests.support.runs import MS, client_row, example_run, server_row, write_run_folder

NAMES = (
    "queue",
    "queue.batch",
    "preprocess.parse",
    "batch.wait",
    "inference",
    "inference.forward",
    "respond",
    "respond.first_byte",
    "respond.stream",
    "tokenize",
    "tokenize.bpe",
)
SHORT = st.integers(0, 5 * MS)
ANY = st.integers(-5 * MS, 40 * MS)


@st.composite
def request(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int], int, str, int]:
    """Return offsets of the client's stamps, stages, `other`, a boot id, and the server's offset."""
    steps = [draw(SHORT) for _ in range(4)]
    stamps = {
        "started_ns": steps[0],
        "connected_ns": sum(steps[:2]),
        "sent_ns": sum(steps[:3]),
        "last_byte_ns": sum(steps) + draw(st.integers(0, 30 * MS)),
    }
    stages = draw(st.dictionaries(st.sampled_from(NAMES), SHORT))
    boot_id = draw(st.sampled_from(["same", "another", ""]))
    return stamps, stages, draw(SHORT), boot_id, draw(ANY)


def broken_down(
    folder: Path, client: list[dict[str, Any]], server: list[dict[str, Any]], boot_id: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return each pair's columns, and the column of each part and sub-stage."""
    run = example_run()
    host = {name: getattr(run.host, name) for name in run.host.__dataclass_fields__}
    run = example_run(host=type(run.host)(**host | {"boot_id": boot_id}))
    tables = open_run(write_run_folder(folder, client, server, run=run))
    spans = find_spans(tables.server, SUB_STAGES)
    found = rows(split(pair(tables, spans), spans).order_by("seq"))
    tables.backend.disconnect()
    order = slots(spans, split_network=True)
    return found, {each.name: each.column for slot in order for each in (slot, *slot.inner)}


@settings(max_examples=40, deadline=None)
@given(st.lists(request(), min_size=1, max_size=20))
def test_parts_sum_to_latency(
    requests: list[tuple[dict[str, int], dict[str, int], int, str, int]],
) -> None:
    """For any rows the parts sum to client latency, and only `unexplained` may be negative."""
    client, server = [], []
    for seq, (stamps, stages, other, boot_id, offset) in enumerate(requests):
        row = client_row(seq)
        row |= {name: row["intended_ns"] + since for name, since in stamps.items()}
        start = row["sent_ns"] + offset
        client.append(row)
        server.append(server_row(row, stages, other_ns=other, boot_id=boot_id, start_ns=start))

    with tempfile.TemporaryDirectory() as folder:
        found, columns = broken_down(Path(folder), client, server, "same")

    outer = {name: column for name, column in columns.items() if "." not in name}
    for row, stamps in zip(found, (stamps for stamps, *_ in requests), strict=True):
        assert row["latency_ns"] == stamps["last_byte_ns"]
        assert sum(row[column] for column in outer.values()) == row["latency_ns"]
        assert all(row[column] >= 0 for name, column in columns.items() if name != "unexplained")
        for stage, column in outer.items():
            inner = [row[each] for name, each in columns.items() if name.startswith(f"{stage}.")]
            assert not inner or sum(inner) <= row[column]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(request(), SHORT, SHORT), min_size=1, max_size=20))
def test_nothing_is_unexplained_where_the_clocks_agree(
    requests: list[tuple[Any, int, int]],
) -> None:
    """A server whose stamps lie between the client's leaves nothing unexplained or cut."""
    client, server = [], []
    for seq, ((stamps, stages, other, boot_id, _), before, after) in enumerate(requests):
        row = client_row(seq)
        row |= {name: row["intended_ns"] + since for name, since in stamps.items()}
        start = row["sent_ns"] + before
        server.append(server_row(row, stages, other_ns=other, boot_id=boot_id, start_ns=start))
        client.append(row | {"last_byte_ns": start + server[-1]["duration_ns"] + after})

    with tempfile.TemporaryDirectory() as folder:
        found, _ = broken_down(Path(folder), client, server, "same")

    for row, (_, before, after) in zip(found, requests, strict=True):
        assert (row["unexplained"], row["after_ns"]) == (0, 0)
        assert row["network"] == before + after


def test_one_clock_splits_the_network(tmp_path: Path) -> None:
    """On one clock the network is what lies before the server's start and after its end."""
    client = client_row(0, latency_ns=20 * MS)
    server = server_row(client, {"inference": 10 * MS})

    (row,), _ = broken_down(tmp_path, [client], [server], server["boot_id"])

    assert (row["network_request"], row["network_response"]) == (1 * MS, 7 * MS)
    assert row["network"] == 8 * MS
    assert row["unexplained"] == 0


def test_two_clocks_leave_the_network_whole(tmp_path: Path) -> None:
    """With another boot id the server's own stamps are not compared with the client's."""
    client = client_row(0, latency_ns=20 * MS)
    server = server_row(client, {"inference": 10 * MS}, boot_id="another", start_ns=7)

    (row,), _ = broken_down(tmp_path, [client], [server], "one")

    assert not row["one_clock"]
    assert (row["network"], row["unexplained"]) == (8 * MS, 0)


def test_empty_boot_ids_are_not_one_clock(tmp_path: Path) -> None:
    """Two hosts without a boot id are not taken for one."""
    client = client_row(0)

    (row,), _ = broken_down(tmp_path, [client], [server_row(client, {}, boot_id="")], "")

    assert not row["one_clock"]


def test_overhang_is_cut_from_respond_first(tmp_path: Path) -> None:
    """What the server did after the client's last byte is not in latency: first `respond` pays."""
    client = client_row(0, latency_ns=13 * MS)
    server = server_row(client, {"inference": 10 * MS, "respond": 1 * MS, "respond.stream": MS})

    (row,), columns = broken_down(tmp_path, [client], [server], server["boot_id"])

    assert row["after_ns"] == 2 * MS
    assert (row["respond"], row[columns["respond.stream"]]) == (0, 0)
    assert (row["network_response"], row["unexplained"]) == (0, 0)


def test_overhang_beyond_respond_is_unexplained(tmp_path: Path) -> None:
    """What `respond` can't pay stands as a negative number in `unexplained`."""
    client = client_row(0, latency_ns=12 * MS)
    server = server_row(client, {"inference": 10 * MS, "respond": MS // 2})

    (row,), _ = broken_down(tmp_path, [client], [server], server["boot_id"])

    assert (row["inference"], row["respond"]) == (10 * MS, 0)
    assert row["unexplained"] == -MS


def test_writing_late_is_client_wait(tmp_path: Path) -> None:
    """Time between the connection and the first byte written is the driver's: client wait."""
    client = client_row(0)
    client |= {"sent_ns": client["connected_ns"] + 3 * MS}

    (row,), _ = broken_down(tmp_path, [client], [server_row(client, {})], "x")

    assert (row["client_wait"], row["connect"]) == (4 * MS, 1 * MS)


def test_own_stage_leaves_other(tmp_path: Path) -> None:
    """A stage with a name of the user's own gets a part, and `other` keeps only the rest."""
    client = client_row(0)
    server = server_row(
        client, {"tokenize": 2 * MS, "tokenize.bpe": MS, "inference": MS}, other_ns=5
    )

    (row,), columns = broken_down(tmp_path, [client], [server], server["boot_id"])

    assert (row[columns["tokenize"]], row[columns["tokenize.bpe"]]) == (3 * MS, MS)
    assert row["other"] == 5
