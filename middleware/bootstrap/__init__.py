"""The folder that `stagescope run` puts first on PYTHONPATH; Python runs its `sitecustomize`."""
