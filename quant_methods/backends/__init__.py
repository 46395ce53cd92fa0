"""Other compression tools, each run by the Python of an environment of its own.

``runners/`` has a script for each of those environments. A ``.lock`` file pins each environment's packages.
"""
