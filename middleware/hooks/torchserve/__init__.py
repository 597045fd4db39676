"""TorchServe: the worker process, and the queue times of its front end."""
