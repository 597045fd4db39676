"""How fast the load driver sends, and how near to its plan, against a server that does nothing.

python benchmarks/driver.py --rate 4000 --duration 4

The server is a process of its own that answers 200 to whatever arrives. The driver is one
thread: compare `cpu_share` at a rate with the rate. On a machine that others use too, lateness
is mostly theirs: `chrt -f 1` (as root) gives both processes a core when they ask for one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
from multiprocessing.connection import Connection

from stagescope.loadgen.arrivals import schedule
from stagescope.loadgen.driver import Driver
from stagescope.loadgen.health import health
from stagescope.loadgen.session import drive
from stagescope.loadgen.target import target

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: text/plain\r\n\r\nok"


class Answering(asyncio.Protocol):
    """Takes each segment for a request: enough for small ones on loopback."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer at once."""
        self._transport.write(ANSWER)


def serve(ready: Connection) -> None:
    """Answer on a free port of loopback until terminated."""

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def measure(port: int, args: argparse.Namespace) -> dict[str, object]:
    """Drive the server at the rate and give the driver's figures."""
    aim = target(f"http://127.0.0.1:{port}/", json_text=args.json)
    plan = schedule(args.arrivals, args.rate, args.duration, 0.5, 1)
    driver = Driver(aim, plan, "bench", timeout_s=10)
    loop = drive(driver, aim, plan.end_ns / 1e9)
    judged = health(driver.log, planned=driver.planned, cpu_share=driver.cpu_share, loop=loop)
    columns = driver.log.integers
    late = [s - i for s, i in zip(columns["started_ns"], columns["intended_ns"], strict=True)]
    sent = sorted(columns["sent_ns"])
    return {
        "loop": loop,
        "planned_per_s": args.rate,
        "sent_per_s": round((len(sent) - 1) / (sent[-1] - sent[0]) * 1e9, 1),
        "within_1_ms_share": sum(ns < 1_000_000 for ns in late) / len(late),
        "invalid_reasons": judged.invalid_reasons,
        **{name: round(value, 4) for name, value in judged.figures.items()},
    }


def main() -> None:
    """Start the server, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=4000.0)
    parser.add_argument("--duration", type=float, default=4.0)
    parser.add_argument("--arrivals", default="poisson")
    parser.add_argument("--json", help="send this as a body, by POST")
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    try:
        print(json.dumps(measure(ours.recv(), args), indent=2))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
