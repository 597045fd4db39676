"""What an agent keeps: samples, recent requests, load runs, and their form on the wire."""
