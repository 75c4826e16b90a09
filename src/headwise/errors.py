"""The errors that are headwise's own. Wrong values and types raise ValueError and TypeError."""

__all__ = ["HeadwiseError", "InputError", "UnsupportedModel"]


class HeadwiseError(Exception):
    """Base of what headwise raises by a name of its own."""


class InputError(HeadwiseError, ValueError):
    """What a person gave (a file, a name, an option) cannot be used; the message says how to mend it.

    The command line prints the message on one line and exits with code 2.
    """


class UnsupportedModel(HeadwiseError, NotImplementedError):
    """This model cannot be read or steered; the message says what would be needed."""
