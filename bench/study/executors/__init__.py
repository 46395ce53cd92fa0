"""What carries out the steps of a study: this process's machine, or a Ray cluster."""
