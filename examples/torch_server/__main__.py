"""`python -m stagescope.examples.torch_server`: serve on loopback until Ctrl-C."""

import uvicorn

from stagescope.examples.command_line import address

host, port = address("Classify JPEGs: POST /predict. The model runs on torch, on a GPU if any.")
uvicorn.run("stagescope.examples.torch_server.app:app", host=host, port=port)
