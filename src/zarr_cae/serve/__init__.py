"""Decoded arrays for readers that do not have this package: as a store, and over HTTP."""
