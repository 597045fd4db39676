"""What changes a whole process, and so has one of its own: FastAPI's hooks, an opened load run.

Each variant runs in one child, which waits to be told to run a block and answers with its cost;
so blocks of children and of the other variants alternate, and a bare app stays bare.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

SOURCE = Path(__file__).parent.parent / "src"

OPENED = "stagescope-6-run"
APART = (OPENED, "apart-bare", "apart-hooks-0", "apart-hooks-6")


class Apart:
    """A child that measures one variant of `APART`; a `with` block ends it."""

    def __init__(self, variant: str, spool: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__, variant, str(spool)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()  # The end of its input is the end of the child.

    def __call__(self, requests: int) -> float:
        """Run a block of *requests*; give µs CPU a request. Raises RuntimeError if it died."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(requests, file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError("the child that measures FastAPI's hooks has died")
        return float(answer)


async def _serve(variant: str, spool: Path) -> None:
    from overhead_apps import fastapi_app, marked
    from overhead_in_process import BAGGAGE, HEADERS, RUN, WARM_UP, Lane, block, drive, opened

    from stagescope.middleware.asgi import StageMiddleware
    from stagescope.middleware.hooks.installer import FrameworkHooks
    from stagescope.middleware.stage import stage

    with ExitStack() as stack:
        if variant == OPENED:
            spool = spool / OPENED
            stack.enter_context(opened(spool, RUN))
            lane = Lane(variant, StageMiddleware(marked(stage), spool=spool), [*HEADERS, BAGGAGE])
        else:
            app = fastapi_app(stage if variant.endswith("-6") else None)
            hooked = StageMiddleware(app, spool=spool, installer=FrameworkHooks())
            lane = Lane(variant, app if variant == "apart-bare" else hooked)
        await drive(lane, WARM_UP)
        for line in sys.stdin:
            await block(lane, int(line))
            print(lane.us[-1], flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(SOURCE))
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
