"""One class an image."""
