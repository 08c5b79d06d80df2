"""Golden records: what TP=1 gave, kept with its provenance.

Requirement: a record says which weights, config, inputs and dtype it is of, and can be trusted
after years in a repository. `records` is what is in one, `store` the folder, `listing` what a
folder holds, `sketches` what is kept of logits, `tensors` how that lies in a safetensors file. The
first three load no torch. `making` runs the subject, `judging` holds a run against a record.
"""
