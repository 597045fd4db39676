"""Every function of ours in a served process is made to raise, one by one: what the app answers.

A process of its own, because hooks, tracer provider and cold start are a process's.
Usage: python -m tests.middleware.raising_functions SPOOL apps|models; a JSON line for each.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # Before anything of ours is imported; never in the tests' own process.
    os.environ["STAGESCOPE_AGENT"] = "off"
    os.environ["STAGESCOPE_RAISE"] = "0"

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from stagescope import StageMiddleware, batch, carry, stage
from stagescope.middleware import patching, process
from stagescope.middleware.hooks import hook
from stagescope.middleware.recording import guard
from stagescope.middleware.runtime import calibration, cold_start, pauses, workers
from stagescope.recorder import format as fmt
from stagescope.recorder import spool as spools
from tests.support import fault_drive as drives
from tests.support.planted_faults import Functions, Key, Target, targets
from tests.support.serving import exchange, served

NTH = 2
"""At which call alone a function raises, the second time that it is tried."""

PASSES = "hands the call on to the app or the server, and guards all else that it does"
GUARDS = "is called by the app, and does all that it does below a guard"
OBJECT = "makes an object for the app to call, and calls nothing of ours"
THREAD = "is a thread's own function, and does all that it does below a guard"
COLLECTOR = "is called by the garbage collector, which ignores and prints what is raised"
EXEMPT = {
    "middleware/asgi.py:StageMiddleware.__init__": GUARDS,
    "middleware/asgi.py:StageMiddleware.__call__": PASSES,
    "middleware/asgi.py:StageMiddleware._pass_on": PASSES,
    "middleware/asgi.py:StageMiddleware._open_and_serve": PASSES,
    "middleware/asgi.py:StageMiddleware._live": PASSES,
    "middleware/asgi.py:StageMiddleware._serve_first": PASSES,
    "middleware/batch.py:batch.__init__": OBJECT,
    "middleware/batch.py:batch.enqueue": GUARDS,
    "middleware/batch.py:batch.add": GUARDS,
    "middleware/batch.py:batch.collate": GUARDS,
    "middleware/batch.py:batch.inference": GUARDS,
    "middleware/batch.py:batch.__enter__": OBJECT,
    "middleware/batch.py:batch.__exit__": GUARDS,
    "middleware/batch.py:batch._over": GUARDS,
    "middleware/batch.py:_Phase.__init__": OBJECT,
    "middleware/batch.py:_Phase.__enter__": OBJECT,
    "middleware/batch.py:_Phase.__exit__": GUARDS,
    "middleware/decorators.py:_function.timed": PASSES,
    "middleware/decorators.py:_coroutine.timed": PASSES,
    "middleware/decorators.py:_generator.timed": PASSES,
    "middleware/decorators.py:_async_generator.timed": PASSES,
    "middleware/decorators.py:Steps.__init__": OBJECT,
    "middleware/decorators.py:Steps.begin": GUARDS,
    "middleware/decorators.py:Steps.end": GUARDS,
    "middleware/decorators.py:Steps.close": GUARDS,
    "middleware/exchange.py:Exchange.receive": PASSES,
    "middleware/exchange.py:Exchange.send": PASSES,
    "middleware/exchange.py:Exchange._send_start": PASSES,
    "middleware/exchange.py:Exchange._send_body": PASSES,
    "middleware/hooks/streams.py:streamed.timed": PASSES,
    "middleware/hooks/streams.py:_Body.send": PASSES,
    "middleware/hooks/anyio.py:_timed.timed": PASSES,
    "middleware/hooks/anyio.py:_Wait.run": PASSES,
    "middleware/hooks/executors.py:_marking.marking": PASSES,
    "middleware/hooks/starlette.py:staged.make.timed": PASSES,
    "middleware/hooks/starlette.py:_rendered.timed": PASSES,
    "middleware/hooks/starlette.py:_mounted.noted": PASSES,
    "middleware/hooks/starlette.py:_routed.noted": PASSES,
    "middleware/probe/server.py:Probe._live": THREAD,
    "middleware/probe/server.py:Probe._serve": THREAD,
    "middleware/hooks/model_calls.py:model_call.__enter__": GUARDS,
    "middleware/hooks/model_calls.py:model_call.__exit__": GUARDS,
    "middleware/hooks/model_calls.py:model_call.__init__": OBJECT,
    "middleware/hooks/model_calls.py:timed_call.timed": PASSES,
    "middleware/hooks/model_calls.py:timed_part.timed": PASSES,
    "middleware/hooks/model_calls.py:_timed.load": PASSES,
    "middleware/hooks/torch.py:time_module": GUARDS,
    "middleware/hooks/torch.py:Begin.__call__": GUARDS,
    "middleware/hooks/torch.py:End.__call__": GUARDS,
    "middleware/hooks/torch.py:_is_compiling": "only asks torch, and torch.compile traces it",
    "middleware/hooks/onnxruntime.py:_timed_async.timed": PASSES,
    "middleware/hooks/onnxruntime.py:_closing.called_back": PASSES,
    "middleware/hooks/transformers.py:on_behalf_of": PASSES,
    "middleware/hooks/transformers.py:_timed_generate.timed": PASSES,
    "middleware/hooks/transformers.py:_timed_prefill.timed": PASSES,
    "middleware/hooks/transformers.py:_owned_init.owned": PASSES,
    "middleware/hooks/transformers.py:_timed_next.timed": PASSES,
    "middleware/hooks/transformers.py:_timed_anext.timed": PASSES,
    "middleware/hooks/transformers.py:_wrapping_init.wrapping": PASSES,
    "middleware/hooks/transformers.py:_with_streamer.called": PASSES,
    "middleware/remote.py:attached": PASSES,
    "middleware/remote.py:carried": GUARDS,
    "middleware/runtime/stops.py:StopWatch._run": THREAD,
    "src/stagescope/embedded.py:EmbeddedAgent._live": THREAD,
    "middleware/recording/guard.py:guarded.__init__": "is the guard",
    "middleware/recording/guard.py:guarded.__enter__": "is the guard",
    "middleware/recording/guard.py:guarded.__exit__": "is the guard",
    "middleware/recording/guard.py:fault": "is the guard",
    "middleware/recording/guard.py:say_once": "is the guard's log",
    "middleware/stage.py:carry": GUARDS,
    "middleware/stage.py:carry.carried": PASSES,
    "middleware/stage.py:marked_call.call": PASSES,
    "middleware/stage.py:stage.__init__": GUARDS,
    "middleware/stage.py:stage.__call__": GUARDS,
    "middleware/stage.py:stage.__enter__": GUARDS,
    "middleware/stage.py:stage.__exit__": GUARDS,
    "middleware/stage.py:stage.of_code": OBJECT,
    "middleware/runtime/loop_waits.py:Steps.__await__": PASSES,
    "middleware/runtime/loop_waits.py:Steps.__next__": PASSES,
    "middleware/runtime/loop_waits.py:Steps.send": PASSES,
    "middleware/runtime/loop_waits.py:Steps.throw": PASSES,
    "middleware/runtime/loop_waits.py:Steps.close": PASSES,
    "middleware/runtime/loop_waits.py:Steps._step": PASSES,
    "middleware/runtime/loop_waits.py:Steps.__getattr__": PASSES,
    "middleware/runtime/stamped_future.py:StampedFuture.set_result": PASSES,
    "middleware/runtime/stamped_future.py:StampedFuture.set_exception": PASSES,
    "middleware/runtime/stamped_future.py:StampedFuture.cancel": PASSES,
    "middleware/runtime/loop_waits.py:_replacements.create_future": PASSES,
    "middleware/runtime/loop_waits.py:_replacements.call_later": PASSES,
    "middleware/runtime/loop_waits.py:_replacements.call_soon_threadsafe": PASSES,
    "middleware/runtime/loop_waits.py:_replacements.create_task": PASSES,
    "middleware/runtime/stamped_future.py:answer": PASSES,
    "middleware/hooks/executors.py:_reporting.submitted": PASSES,
    "middleware/hooks/executors.py:_unpacking.unpacking": PASSES,
    "middleware/runtime/thread_clock.py:timed": PASSES,
    "middleware/runtime/workers.py:_gone": COLLECTOR,
    "middleware/runtime/workers.py:_wait": PASSES,
    "middleware/runtime/workers.py:_notify": PASSES,
    "middleware/runtime/thread_clock.py:ThreadClock.__del__": COLLECTOR,
    "middleware/runtime/pauses.py:Collections.tell": COLLECTOR,
    "middleware/runtime/cold_start.py:Startup.send": PASSES,
    "middleware/runtime/cold_start.py:FirstRequest.send": PASSES,
    "src/stagescope/face.py:StageMiddleware.__init__": PASSES,
    "src/stagescope/__init__.py:__getattr__": "is an import, before an app is wrapped",
}
"""What may raise through to the app, or ends what is above it, with a reason each."""

REAL_SERVERS = "its framework has an environment of its own: tests/servers run it for real"
PROBED = "answers the probe, below its guard, for seconds or where torch has a device"
STARTED = (
    "is installed as a server starts, below the guard of `install`, and not in an app's process"
)
THIRD_PARTY = "only names methods of a library for model_calls.py, whose functions are tried"
BATCHERS = "is used by hooks of batching servers alone: tests/servers run them for real"
NOT_REACHED = {
    "middleware/hooks/bentoml.py": REAL_SERVERS,
    "middleware/hooks/litserve/": REAL_SERVERS,
    "middleware/hooks/mlserver.py": REAL_SERVERS,
    "middleware/hooks/pytriton.py": REAL_SERVERS,
    "middleware/hooks/ray/": REAL_SERVERS,
    "middleware/hooks/torchserve/": REAL_SERVERS,
    "middleware/hooks/boosting.py": THIRD_PARTY,
    "middleware/hooks/keras.py": THIRD_PARTY,
    "middleware/hooks/sentence_transformers.py": THIRD_PARTY,
    "middleware/hooks/sklearn.py": THIRD_PARTY,
    "middleware/bootstrap/": STARTED,
    "middleware/hooks/asgi_servers.py": STARTED,
    "middleware/hooks/autoload.py": STARTED,
    "middleware/hooks/wrapping.py": STARTED,
    "middleware/recording/deferred.py": REAL_SERVERS,
    "middleware/recording/timeline_group.py": BATCHERS,
    "middleware/runtime/observers.py": PROBED,
    "middleware/runtime/shared_rounds.py": BATCHERS,
    "middleware/torch/capture.py": PROBED,
    "middleware/torch/device_time.py": PROBED,
    "middleware/torch/ledger.py": PROBED,
    "middleware/torch/profiler.py": PROBED,
}
"""Files none of whose functions is tried here, with a reason each."""

APPS = ("fastapi", "added", "raw")


class Faults(logging.Handler):
    """Counts what the guard logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.lines.append(record.getMessage())


class Session:
    """Drives the apps again and again, each time as in a process that has just started."""

    def __init__(self, spool: Path) -> None:
        self.spool = spool
        self.mode = ""
        self.faults = Faults()
        spools._RING_CHOICES = (64,) * 5  # Small files, made hundreds of times.
        calibration.ROUNDS = 2
        self.numbers = count()
        ours = logging.getLogger("stagescope")
        ours.addHandler(self.faults)
        ours.propagate = False
        logging.getLogger("asyncio").addHandler(self.faults)
        logging.getLogger("asyncio").propagate = False
        logging.getLogger("uvicorn.error").disabled = True  # It logs what the app raises.
        self.spans: Callable[[str], Any] = nullcontext

    def enter(self, mode: str) -> None:
        """From now on requests name a load run (`run`), or the app makes spans too (`spans`)."""
        self.mode = mode
        if mode == "spans":
            trace.set_tracer_provider(TracerProvider())
            self.spans = trace.get_tracer("app").start_as_current_span

    def drive(self, bare: bool, late: Callable[[], None] | None = None) -> dict[str, Any]:
        """Serve all apps; *late* is called when each has served its first request."""
        answers: dict[str, Any] = {}
        api = drives.BARE if bare else drives.Api(stage, carry, batch)
        for name in APPS:
            folder = self.spool / str(next(self.numbers))
            made = drives.raw_app(api) if name == "raw" else drives.fastapi_app(api, self.spans)
            cases = drives.RAW_CASES if name == "raw" else drives.FASTAPI_CASES
            if name == "added":
                cases = tuple(
                    case for case in cases if case[1] in ("/thread", "/tokens", "/raises")
                )
            app = made.app
            try:
                if not bare and name == "added":
                    app.add_middleware(StageMiddleware, spool=folder)
                elif not bare:
                    app = StageMiddleware(app, spool=folder)
                run = b"opened" if self.mode == "run" else b""
                if run:
                    runs = folder / spools.RUNS_FOLDER
                    runs.mkdir(mode=0o700, parents=True)
                    folder.chmod(0o700)
                    (runs / f"opened{spools.OPEN_RUN_SUFFIX}").touch()
                answers[name] = asyncio.run(drives.drive(app, cases, run, late))
            except Exception as error:  # noqa: BLE001 - told as it is
                answers[name] = [f"{type(error).__name__}: {error}"]
            answers[name].append(made.done)
        return answers

    def serve(self, *, bare: bool) -> list[str]:
        """Serve one app by a real uvicorn; returns the answers, byte for byte but for the date."""
        folder = self.spool / str(next(self.numbers))
        app = drives.fastapi_app(
            drives.BARE if bare else drives.Api(stage, carry, batch), nullcontext
        ).app
        if not bare:
            app = StageMiddleware(app, spool=folder)
        with served(app) as port:
            answers = [exchange(port, request) for request in drives.RAW_REQUESTS]
        return [re.sub(rb"date: [^\r]*\r\n", b"", each).decode() for each in answers]

    def call_models(self, *, bare: bool) -> dict[str, Any]:
        """Serve an app that calls models, lends its timeline, and is asked by its probe."""
        from tests.support import fault_models

        folder = self.spool / str(next(self.numbers))
        if not bare:
            with guard.guarded():  # As the middleware does.
                hook.install_loaded(fault_models.HOOKS)
        app = fault_models.models_app(bare=bare, spool=folder)
        if not bare:
            app = StageMiddleware(app, spool=folder)
        return {"models": asyncio.run(drives.drive(app, fault_models.CASES))}

    def close(self) -> tuple[int, int]:
        """Close all recorders: slots that are lost, and faults that were counted."""
        if embedded := sys.modules.get("stagescope.embedded"):
            embedded._stop_all()
        lost = counted = 0
        for entry in process._open.values():
            if entry is not None:
                recorder, file = entry
                free: Any = getattr(recorder.take_slot, "__self__")  # noqa: B009
                lost += len(recorder._slots) - len(free)
                counted += recorder._words[fmt.COUNTER_WORDS + fmt.COUNTERS.index("faults")]
                recorder.close()
                os.close(file.fd)
                file.path.unlink()
        process._open.clear()
        process._stop_probes()
        return lost, counted

    def fresh(self) -> None:
        """Forget what a process that has just started does not know."""
        patching.unwrap(0)
        hook._installed.clear()
        guard._said.clear()
        pauses.pool = None
        self.faults.lines.clear()
        workers._users.clear()
        workers.switch_off(self)
        cold_start._begin_anew_in_child()


def files() -> list[Path]:
    """Return our source files that this process has loaded."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "stagescope" and getattr(module, "__file__", None):
            found.add(Path(str(module.__file__)).resolve())
    return sorted(file for file in found if "testing" not in file.parts)


def called_by(functions: Functions, work: Callable[[], object]) -> Counter[Key]:
    """Return the functions that *work* calls, in any thread, and how often."""
    codes: Counter[CodeType] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            codes[frame.f_code] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    called: Counter[Key] = Counter()
    for code, times in codes.items():
        called[functions.key(code)] += times
    return called


def main(spool: Path, kind: str) -> None:
    """Print what each function's fault did."""
    session = Session(spool)
    covered: set[Key] = set()
    if kind == "models":
        session.enter("models")
        try_all(session, covered, MODELS, lambda bare: session.call_models(bare=bare))
        return
    for mode in ("plain", "run", "spans"):
        session.enter(mode)
        try_all(session, covered, ("",), session.drive)
    session.enter("served")
    serve_all(session)


MODELS = ("middleware/hooks/", "middleware/remote.py", "middleware/probe/", "middleware/torch/")
"""What the process that calls models lets raise; all else is tried in the other one."""


def try_all(
    session: Session,
    covered: set[Key],
    parts: tuple[str, ...],
    drive: Callable[[bool], dict[str, Any]],
) -> None:
    """Let each function raise that *drive* calls and that is not *covered* yet; add them to it."""
    session.fresh()
    want = drive(True)
    session.fresh()
    differs = verdict(drive(False), want)
    print(json.dumps({"name": "", "mode": session.mode, "lost": session.close()[0], **differs}))
    functions = Functions(files())
    session.fresh()
    called = called_by(functions, lambda: drive(False))
    session.close()
    for target in targets(ROOT, files()):
        times = 0 if target.key in covered else called[target.key]
        if not times or target.name in EXEMPT or not target.name.startswith(parts):
            continue
        for when in ("always", "once")[: min(times, NTH)]:
            row = tried(session, functions, target, when, want, lambda: drive(False))
            row = {"name": target.name, "mode": session.mode, "when": when, **row}
            print(json.dumps(row), flush=True)
    covered |= called.keys()


SEAMS = (
    "asgi.py:StageMiddleware.open", "asgi.py:stopped", "exchange.py:begin",
    "exchange.py:Exchange._started", "exchange.py:Exchange.end", "exchange.py:Exchange.finish",
    "timeline.py:Timeline.finish", "hooks/installer.py:FrameworkHooks.wrapped", "/embedded.py:",
    "src/stagescope/face.py:start_embedded",
)  # fmt: skip
"""What is tried behind a real uvicorn too, with the embedded agent on."""


def serve_all(session: Session) -> None:
    """Let the seams raise in a real server, and the embedded agent's functions beside it."""
    os.environ["STAGESCOPE_AGENT"] = "thread"
    session.fresh()
    want = {"served": session.serve(bare=True)}
    differs = verdict({"served": session.serve(bare=False)}, want)
    print(json.dumps({"name": "", "mode": "served", "lost": session.close()[0], **differs}))
    session.fresh()
    functions = Functions(files())
    called = called_by(functions, lambda: session.serve(bare=False))
    session.close()
    for target in targets(ROOT, files()):
        seam = any(each in target.name for each in SEAMS)
        if seam and called[target.key] and target.name not in EXEMPT:
            row = tried(
                session, functions, target, "always", want,
                lambda: {"served": session.serve(bare=False)},
            )  # fmt: skip
            row = {"name": target.name, "mode": "served", "when": "always", **row}
            print(json.dumps(row), flush=True)


def tried(
    session: Session,
    functions: Functions,
    target: Target,
    when: str,
    want: Any,
    drive: Callable[[], Any],
) -> dict[str, Any]:
    """Drive the apps while *target* raises."""
    calls = hits = 0

    def raises() -> bool:
        nonlocal calls, hits
        calls += 1
        hit = when != "once" or calls == NTH
        hits += hit
        return hit

    undone: list[Callable[[], None]] = []

    def plant() -> None:
        if not undone:
            undone.append(functions.plant(target, raises))

    session.fresh()
    plant()
    try:
        found = drive()
    finally:
        for undo in undone:
            undo()
    logged = session.faults.lines[:3]
    lost, counted = session.close()
    return {
        "hits": hits, "logged": logged, "lost": lost, "counted": counted, **verdict(found, want)
    }  # fmt: skip


def verdict(found: dict[str, Any], want: Any) -> dict[str, Any]:
    """Return what differs from the answers of the bare apps."""
    differs = ""
    for name, answers in found.items():
        for at, answer in enumerate(answers):
            if at >= len(want[name]) or answer != want[name][at]:
                differs = (
                    differs
                    or f"{name}: {str(answer)[:300]} and not {str(want[name][at : at + 1])[:300]}"
                )
    return {"differs": differs}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
