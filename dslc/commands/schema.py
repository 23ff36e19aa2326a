"""`dslc schema`: the JSON schema of specs, for editors."""

from __future__ import annotations

EXAMPLES = """
\b
Examples:
  dslc schema > spec.schema.json
  In VS Code with the YAML extension, the first line of a spec then may read
  # yaml-language-server: $schema=spec.schema.json
"""


def run() -> None:
    """Print the JSON schema of specs.

    With it, editors complete and check a spec while you type."""
    from dsl.schema import json_schema
    from dslc.report import print_json

    print_json(json_schema())
