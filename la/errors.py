"""The errors that are the user's to fix."""


class InputError(ValueError):
    """Input that cannot be used: a file, a field or a flag.

    The message names what is at fault, what was found, what was expected and what to do next. The command line prints
    it alone, without a traceback, and exits with code 2.
    """


class Diverged(InputError):
    """Training came to a loss or a gradient that is not finite; what to change is the user's choice."""


class TooFewImages(InputError):
    """An episode asks for more classes or shots than there are images for."""
