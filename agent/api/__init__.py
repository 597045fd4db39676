"""The control API of an agent: its socket and ports, the HTTP server, and the client."""
