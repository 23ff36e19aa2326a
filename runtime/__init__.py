"""What a generated module needs while it runs. A copy travels with every build."""
