"""An image classifier behind FastAPI: decoding on threads, a dynamic batcher, ONNX Runtime."""
