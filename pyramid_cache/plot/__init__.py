"""
Figures of what caches hold. Each function returns a `matplotlib.figure.Figure`: notebooks show it, `savefig` writes
it. No function opens a window. matplotlib is imported when one is called.
"""

from pyramid_cache.plot.kept import plot_budgets, plot_kept_positions, plot_kept_tokens
from pyramid_cache.plot.scores import ScoreRecorder, plot_scores


__all__ = ["ScoreRecorder", "plot_budgets", "plot_kept_positions", "plot_kept_tokens", "plot_scores"]
