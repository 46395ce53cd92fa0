"""Statistics of the inputs of linear layers, before and after a recipe's preparing steps."""
