"""The steps of recipes: rounding, scaling, rotating and pruning, one paper a file."""
