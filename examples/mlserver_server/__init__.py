"""A batching model on MLServer, with one worker process."""
