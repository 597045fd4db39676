"""What holds the server back: one evidence object, small rules over it, and their judgement."""
