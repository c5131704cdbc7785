"""Zarr chunks to planes of floats and back."""
