"""Frames, rANS streams and frequency tables: integer arithmetic only, without zarr and without torch."""
