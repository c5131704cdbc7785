"""The transforms, and the engine that runs them in batches."""
