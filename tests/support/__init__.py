"""Stand-ins for what is not at hand, and the real processes that the tests start."""
