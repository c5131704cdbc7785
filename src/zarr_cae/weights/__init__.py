"""Weights files: their format, the folders that hold them, and CompressAI's checkpoints."""
