"""Scoring at TP=1 while generation goes on at TP=N: the remedies, as code that a server can run."""
