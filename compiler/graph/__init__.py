"""The graph: types, operators in regions, text form, verifier."""
