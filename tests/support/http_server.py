"""A real HTTP server on a thread whose replies a test writes down, byte by byte if need be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

Script = Callable[["Exchange"], Awaitable[None]]
"""What the server does with one request; when it returns, the next is read."""

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Exchange:
    """One request as it came in, and the connection to answer on."""

    def __init__(self, head: bytes, body: bytes, number: int, out: asyncio.StreamWriter) -> None:
        """*number* counts the server's requests from 0."""
        self.start_line, _, rest = head.decode("latin-1").partition("\r\n")
        lines = [line.partition(":") for line in rest.split("\r\n") if line]
        self.headers = [(name.lower(), value.strip()) for name, _, value in lines]
        self.body = body
        self.number = number
        self.out = out

    def header(self, name: str) -> str:
        """Return the one value of header *name*, empty where it is missing."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else ""

    async def reply(self, reply: bytes) -> None:
        """Write *reply* as it is."""
        self.out.write(reply)
        await self.out.drain()

    def close(self) -> None:
        """Close the connection in good order."""
        self.out.close()

    def reset(self) -> None:
        """Break the connection (TCP RST)."""
        import socket
        import struct

        sock = self.out.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.out.transport.abort()


async def ok(exchange: Exchange) -> None:
    """Answer 200 at once."""
    await exchange.reply(OK)


class ScriptedServer:
    """Listens on a free port of loopback while its `with` block lasts."""

    def __init__(self, script: Script = ok) -> None:
        """*script* answers every request."""
        self._script = script
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0
        self.requests: list[Exchange] = []
        """All that came in, in order."""

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/work"

    def __enter__(self) -> Self:
        """Start it."""
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it, connections and all."""
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def refuse(self) -> None:
        """Stop listening and drop the connections, from inside a script."""
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._stop.wait()
        self.refuse()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._answer_all(reader, out)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            out.close()

    async def _answer_all(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        while not out.is_closing():
            head = await reader.readuntil(b"\r\n\r\n")
            exchange = Exchange(head, b"", len(self.requests), out)
            if length := exchange.header("content-length"):
                exchange.body = await reader.readexactly(int(length))
            self.requests.append(exchange)
            await self._script(exchange)
