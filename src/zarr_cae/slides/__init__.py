"""Slides, stacks and scenes: any image file to OME-Zarr pyramids, piece by piece."""
