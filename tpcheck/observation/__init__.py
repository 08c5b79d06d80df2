"""What execution can see of a subject: casts, choices, modules, weights read, partial sums."""
