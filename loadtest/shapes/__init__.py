"""How load goes over time: the shapes of a stage, one a file, and the arrival processes of an open loop."""
