"""Two captures, recorded by anything, held against each other tensor by tensor.

Requirement: `tpcheck diff EXPECTED ACTUAL` answers for engines that tpcheck cannot run. Nothing is
unpickled, memory does not grow with the tensors, and what is bad, missing or odd in a capture is a
finding that names it. In reading order: tensors, reading (files and ranks), order, tolerances,
shard_map (what the user says), layouts (which rank holds what), measuring (numbers), attribution
(which rank), verdicts (words and outcomes), comparing (the loop, `tpcheck.diff`).
"""
