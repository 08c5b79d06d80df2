"""Subjects we did not write."""
