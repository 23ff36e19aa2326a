"""The languages people write: YAML specs and blocks, read with exact source positions."""
