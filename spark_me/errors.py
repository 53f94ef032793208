"""Errors that are for the user: one line that says what, where, and what to do next."""


class UserError(Exception):
    """Bad input or a bad environment. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 2


class EngineError(UserError):
    """MinkowskiEngine is missing, does not build, or computes wrongly."""

    exit_code = 1
