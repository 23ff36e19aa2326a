"""Ranks, and what each of them holds: below passes and plan, which both speak of it."""
