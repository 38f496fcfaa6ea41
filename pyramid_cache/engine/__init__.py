"""What every method shares, written once: the seam to transformers, storage, budgets, selection, rotary positions."""
