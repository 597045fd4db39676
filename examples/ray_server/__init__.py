"""A batching model behind a FastAPI ingress on Ray Serve."""
