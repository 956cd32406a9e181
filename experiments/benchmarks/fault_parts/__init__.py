"""What the fault benchmarks break things with, and how they report it."""
