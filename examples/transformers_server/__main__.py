"""`python -m stagescope.examples.transformers_server [PORT]`: serve on loopback."""

import sys

import uvicorn

from stagescope.examples.transformers_server.app import app

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
