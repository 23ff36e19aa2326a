"""The report of a build: one page that says what was built."""

from backends.report.page import render_report

__all__ = ["render_report"]
