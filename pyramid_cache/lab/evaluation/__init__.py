"""What the caches lose: questions about long contexts, answered with each cache and with the full one."""
