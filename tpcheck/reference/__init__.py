"""The plain decoder that generated models are made of, one concern a file."""
