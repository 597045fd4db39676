"""A text classifier served by TorchServe."""
