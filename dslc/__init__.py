"""The command line of dslc."""
