"""Many compressions of one model, as a table and a plot."""
