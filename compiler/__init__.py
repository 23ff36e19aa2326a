"""From a checked model description to graphs that are rewritten, measured and printed."""
