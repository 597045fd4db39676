"""The recorder: how a request becomes a record in the memory-mapped file."""
