"""An ONNX model behind FastAPI, timed without marks."""
