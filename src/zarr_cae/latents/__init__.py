"""The read-only view of latents."""
