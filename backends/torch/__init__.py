"""Readable torch code from graphs. Imports no torch itself."""
