"""Ray Serve: proxies, replicas and batches."""
