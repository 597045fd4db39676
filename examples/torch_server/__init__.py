"""A small image classifier behind FastAPI, with its stages marked: see README.md."""
