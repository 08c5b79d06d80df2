"""Pure functions of a Report."""
