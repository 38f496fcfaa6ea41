"""The demonstration: one question about a long text, answered with each cache, and what each cache cost."""
