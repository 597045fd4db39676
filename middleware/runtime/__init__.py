"""What is true of the whole process: cold start, pauses, and what the middleware itself costs."""
