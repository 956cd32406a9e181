"""Cars that are made by formula, for the quickstart, the tests and first looks."""
