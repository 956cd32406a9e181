"""How the fault benchmarks break things, and how they report what came of it."""
