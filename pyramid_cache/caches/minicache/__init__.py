"""Layers that share directions: MiniCache."""
