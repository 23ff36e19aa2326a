"""From graphs to files: torch modules, reports."""

VERSION = "0.1.0"
