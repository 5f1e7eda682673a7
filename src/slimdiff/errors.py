"""The error that is meant for the person who runs slimdiff."""


class SlimdiffError(ValueError):
    """Something the caller can put right: the message names the value, what was expected, the fix.

    The command line prints the message on one line and exits with code 2.
    """
