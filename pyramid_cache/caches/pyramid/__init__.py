"""PyramidInfer: the cache, and the pruning of hidden states while a prompt is read."""
