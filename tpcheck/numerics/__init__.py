"""The arithmetic: ulps, bounds with their sources, the law of drift, emulated reductions."""
