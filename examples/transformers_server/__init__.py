"""A text classifier and a text generator behind Hugging Face pipelines, timed without marks."""
