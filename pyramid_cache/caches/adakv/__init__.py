"""Ada-KV: the cache, and the store of heads that keep different numbers of tokens."""
