"""Serving: the engine that computes requests together, and the HTTP server in front of it."""
