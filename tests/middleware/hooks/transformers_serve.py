"""`transformers serve` as users start it, with a model that takes a known time for each token.

    python transformers_serve.py MODEL PORT TRUTH

writes to the file TRUTH, for each `generate`, one line: begin and end, monotonic ns.
"""

import json
import sys
import time
from typing import Any

from transformers import LlamaForCausalLM
from transformers.cli.transformers import main

TOKEN_S = 0.04


def plant(truth: str) -> None:
    """Let each forward pass take TOKEN_S longer, and each `generate` be written down."""
    forward, generate = LlamaForCausalLM.forward, LlamaForCausalLM.generate

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(TOKEN_S)
        return forward(self, *args, **kwargs)

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic_ns()
        try:
            return generate(self, *args, **kwargs)
        finally:
            with open(truth, "a") as file:
                file.write(json.dumps([begun, time.monotonic_ns()]) + "\n")

    LlamaForCausalLM.forward, LlamaForCausalLM.generate = slowly, noted


if __name__ == "__main__":
    plant(sys.argv[3])
    sys.argv[1:] = [
        "serve",
        sys.argv[1],
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        sys.argv[2],
    ]
    main()
