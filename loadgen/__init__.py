"""The load driver: arrivals, the open-loop driver, and what it keeps of each request."""
