"""The recorder file: its format, the reader, and the decoder of its slots."""
