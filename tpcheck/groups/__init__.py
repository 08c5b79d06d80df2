"""The seam: what a subject sees of its ranks, simulated or real."""
