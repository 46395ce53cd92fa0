"""One page of many results."""
