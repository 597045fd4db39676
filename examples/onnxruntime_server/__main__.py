"""`python -m stagescope.examples.onnxruntime_server`: serve on loopback until Ctrl-C."""

import uvicorn

from stagescope.examples.command_line import address

host, port = address("Classify rows of numbers by a small ONNX model: POST /predict.")
uvicorn.run("stagescope.examples.onnxruntime_server.app:app", host=host, port=port)
