"""Read the archives of caecodec, the predecessor of this package, and move them to Zarr v3."""
