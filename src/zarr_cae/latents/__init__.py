"""Latents of CAE arrays as read-only arrays of their own."""
