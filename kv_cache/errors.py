"""The error that every room above ``kv_cache`` raises for bad input."""


class ParetoError(ValueError):
    """Bad input from a person: the message is one line that says what is wrong and what would be right.

    The ``pareto`` command prints it without a traceback and exits with status 2.
    """
