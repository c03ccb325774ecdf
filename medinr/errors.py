"""Errors that are a user's mistake: the command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """One line that names the file or key, what was expected, what was found, and the remedy."""


class RegistrationWarning(UserWarning):
    """Something that a careful reader of the results must know (overlap lost, landmarks outside the mask, ...)."""
