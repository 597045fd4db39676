"""A proxy between driver and server that delays bytes, or takes answers slowly. Prints its port.

`proxy.py PORT DELAY_MS BYTES_PER_S`; 0 for bytes as they come. It ends when its input does.
"""

from __future__ import annotations

import asyncio
import socket
import sys

UPSTREAM, DELAY_S, RATE = int(sys.argv[1]), float(sys.argv[2]) / 1e3, float(sys.argv[3])
PIECE = 16_384


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        while piece := await reader.read(PIECE):
            if rate:
                await asyncio.sleep(len(piece) / rate)
            if DELAY_S:
                loop.call_later(DELAY_S, writer.write, piece)
            else:
                writer.write(piece)
                await writer.drain()
    except ConnectionError:
        pass
    finally:
        loop.call_later(DELAY_S, writer.close)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    upstream = socket.socket()
    if RATE:
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE)
    upstream.setblocking(False)
    await asyncio.get_running_loop().sock_connect(upstream, ("127.0.0.1", UPSTREAM))
    back, forth = await asyncio.open_connection(sock=upstream, limit=PIECE)
    await asyncio.gather(_pass_on(reader, forth, 0), _pass_on(back, writer, RATE))


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


asyncio.run(_main())
