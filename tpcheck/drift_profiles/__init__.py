"""`tpcheck drift`: how far rounding moved a model, by degree, dtype, layer, rank and token."""
