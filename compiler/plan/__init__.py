"""The plan: which rank holds and does what, what that takes, and why it does or does not fit."""
