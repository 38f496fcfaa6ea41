"""
Figures of what caches hold. Each function returns a `matplotlib.figure.Figure`, which notebooks show and `savefig` writes;
none opens a window, and matplotlib is imported when one is called.
"""

from pyramid_cache.plot.kept import plot_budgets, plot_kept_positions, plot_kept_tokens
from pyramid_cache.plot.scores import ScoreRecorder, plot_scores


__all__ = ["ScoreRecorder", "plot_budgets", "plot_kept_positions", "plot_kept_tokens", "plot_scores"]
