"""One page that shows a run: settings, shardings, curves, measures and texts.
Imports `config`, `records` and `common`.
"""
