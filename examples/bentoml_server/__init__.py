"""Two BentoML services, one of which batches; see README.md."""
