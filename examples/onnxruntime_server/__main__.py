"""`python -m stagescope.examples.onnxruntime_server [PORT]`: serve on loopback."""

import sys

import uvicorn

from stagescope.examples.onnxruntime_server.app import app

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
