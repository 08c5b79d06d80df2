"""`tpcheck probe`: in which order and precision a backend reduces."""
