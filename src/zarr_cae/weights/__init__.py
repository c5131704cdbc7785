"""Weights files: the format, where they lie, and CompressAI's checkpoints."""
