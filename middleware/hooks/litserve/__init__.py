"""LitServe: the server process and its inference workers."""
