"""aiohttp's client with our stamps in it, at the places where the bytes are.

Cheaper and nearer to the wire than aiohttp's trace hooks, which fire when a coroutine gets
its turn: the response's stamps are taken in the protocol, as the bytes come in.
"""

from __future__ import annotations

import ssl
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import set_result

from stagescope.loadgen.client_log import Call

if TYPE_CHECKING:
    from aiohttp.connector import Connection

CURRENT: ContextVar[Call] = ContextVar("stagescope_call")
"""The call that the running task is about."""

_INFORMATIONAL = 200
CONTINUE_S = 1.0


class StampingProtocol(ResponseHandler):
    """One connection; stamps the response of the call that it serves."""

    call: Call | None = None
    served = False

    def data_received(self, data: bytes) -> None:
        """Take the moment before parsing: when the parser is done, others may have had a turn."""
        call = self.call
        if call is not None and data:
            call.last_byte_ns = time.monotonic_ns()
        super().data_received(data)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Called by the parser for each head; that of an informational response does not count."""
        call = self.call
        if call is not None and data[0].code >= _INFORMATIONAL:
            call.first_byte_ns = call.last_byte_ns
        super().feed_data(data, size)


class StampingRequest(aiohttp.ClientRequest):
    """Stamps the moment just before the request's first byte is written."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Without a body the head is written in here, at once."""
        CURRENT.get().sent_ns = time.monotonic_ns()
        return await super().send(conn)

    async def write_bytes(self, writer: Any, *args: Any, **kwargs: Any) -> None:
        """With a body, newer aiohttp writes the head here, together with the body."""
        if hasattr(writer, "send_headers"):
            CURRENT.get().sent_ns = time.monotonic_ns()
        if (go_on := self._continue) is not None:
            # RFC 9110, 10.1.1: a client does not wait for 100 without limit; curl waits a second.
            self.loop.call_later(CONTINUE_S, set_result, go_on, True)
        await super().write_bytes(writer, *args, **kwargs)


class StampingConnector(aiohttp.TCPConnector):
    """Any number of kept-alive connections; stamps connect and its phases."""

    def __init__(self, *, resolves: bool, trust: ssl.SSLContext | None = None) -> None:
        """*resolves*: the host is a name, so that name resolution is worth a figure."""
        super().__init__(limit=0, ssl=trust or True)
        self._resolves = resolves
        self._factory: Any = self._protocol

    def _protocol(self) -> StampingProtocol:
        return StampingProtocol(loop=self._loop)

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:
        """Return a connection, and give the connection the call that it will serve."""
        connection = await super().connect(*args, **kwargs)
        call = CURRENT.get()
        protocol = connection.protocol
        assert isinstance(protocol, StampingProtocol)
        protocol.call = call
        call.reused = protocol.served
        protocol.served = True
        call.connected_ns = time.monotonic_ns()
        return connection

    async def _create_connection(self, *args: Any, **kwargs: Any) -> ResponseHandler:
        call = CURRENT.get()
        begun = time.monotonic_ns()
        try:
            return await super()._create_connection(*args, **kwargs)
        finally:
            call.tcp_ns = time.monotonic_ns() - begun - call.dns_ns

    async def _resolve_host(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic_ns()
        try:
            return await super()._resolve_host(*args, **kwargs)
        finally:
            if self._resolves:
                CURRENT.get().dns_ns = time.monotonic_ns() - begun
