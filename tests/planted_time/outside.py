"""A process that answers after a while: what `server.outside` waits for. Prints its port.

It ends when its standard input does."""

from __future__ import annotations

import socketserver
import sys
import threading
import time


class Answer(socketserver.StreamRequestHandler):
    """Sleeps as many ms as the line says, and answers with how many it was."""

    def handle(self) -> None:
        """Serve one connection."""
        asked = float(self.rfile.readline())
        begun = time.monotonic()
        time.sleep(asked / 1e3)
        self.wfile.write(f"{(time.monotonic() - begun) * 1e3}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    """One thread a connection."""

    daemon_threads = True
    request_queue_size = 1024


with Server(("127.0.0.1", 0), Answer) as server:
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # Until the server that started it has gone.
