"""The one error that is the user's to fix."""


class InputError(ValueError):
    """Input that cannot be used: a file, a field or a flag.

    The message names what is at fault, what was found, what was expected and what to do next. The command line prints
    it alone, without a traceback, and exits with code 2.
    """


class TooFewImages(InputError):
    """An episode asks for more classes or shots than there are images for."""
