"""
ShadowKV: `cache` for users, `layer` what a layer attends to, `step` its decode step, `store` all the rest, in a form
that takes less.
"""
