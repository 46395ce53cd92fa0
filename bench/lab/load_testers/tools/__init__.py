"""The load testers, one a file: how each is told what to do, and what its results say."""
