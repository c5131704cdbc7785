"""Frames, rANS streams and frequency tables. Imports neither zarr nor torch."""
