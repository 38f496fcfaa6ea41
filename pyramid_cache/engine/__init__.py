"""What every method shares, written once: the seam to transformers, layers, stores, budgets, rotations, files."""
