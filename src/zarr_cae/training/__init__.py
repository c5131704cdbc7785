"""Training of the bundled family, and of a user's own: data, loss, loop, export."""
