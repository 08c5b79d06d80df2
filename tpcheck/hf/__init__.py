"""Hugging Face's config.json, read into a ModelSpec."""
