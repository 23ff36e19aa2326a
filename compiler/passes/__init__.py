"""Passes: named functions from program to program, one a file."""
