"""`python -m stagescope.examples.transformers_server`: serve on loopback until Ctrl-C."""

import uvicorn

from stagescope.examples.command_line import address

host, port = address("Serve small Hugging Face pipelines with random weights.")
uvicorn.run("stagescope.examples.transformers_server.app:app", host=host, port=port)
