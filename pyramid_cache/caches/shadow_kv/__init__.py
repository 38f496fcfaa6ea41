"""ShadowKV: `cache` for users, `layer` what a step attends to, `store` all the rest, in a form that takes less."""
