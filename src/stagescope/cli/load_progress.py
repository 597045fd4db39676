"""What a load run shows while it goes on: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stagescope.loadgen.session import Glimpse, Watch

BAR_EVERY_S = 0.5
"""Drawing takes a millisecond or two of the driver's thread: not more often."""
LINE_EVERY_S = 5.0


@contextmanager
def progress(quiet: bool) -> Iterator[Watch | None]:
    """Give a watch that writes to standard error; None where nothing is to be shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield Watch(lambda now: print(_line(now), file=sys.stderr, flush=True), LINE_EVERY_S)


@contextmanager
def _bar() -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("connecting", total=1.0)

        def look(now: Glimpse) -> None:
            done = min(now.elapsed_s, now.whole_s)
            bar.update(task, total=now.whole_s, completed=done, description=_line(now))
            bar.refresh()

        yield Watch(look, BAR_EVERY_S)


def _line(now: Glimpse) -> str:
    elapsed_s = min(now.elapsed_s, now.whole_s)
    return (
        f"{elapsed_s:.0f}/{now.whole_s:.0f} s  sent {now.sent:,}/{now.planned:,}  "
        f"in flight {now.in_flight:,}  errors {now.failed:,}  "
        f"{now.rate_per_s:,.1f}/s  p50 {now.p50_ms:,.1f} ms"
    )
