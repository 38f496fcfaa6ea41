"""Loaders of public sets of questions about long contexts, by hub id or from a local file."""
