"""`python -m stagescope.examples.image_server`: serve on loopback until Ctrl-C."""

import uvicorn

from stagescope.examples.command_line import address

host, port = address("Classify JPEGs: POST /predict. The model runs on ONNX Runtime.")
uvicorn.run("stagescope.examples.image_server.onnx:app", host=host, port=port)
