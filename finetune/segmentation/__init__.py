"""One class per pixel."""
