"""A text classifier on LitServe, in batches; see README.md."""
