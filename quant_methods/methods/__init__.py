"""The steps of recipes: rounding, scaling, rotating and tuning, one paper a file."""
