"""Comparing two backends, or a backend with transformers, on the same weights."""
