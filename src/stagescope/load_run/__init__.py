"""A load run: drive the server, collect its side of the story, write the run folder."""
