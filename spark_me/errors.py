"""Errors that are for the user: one line that says what, where, and what to do next."""


class UserError(Exception):
    """Bad input or a bad environment. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 2


class EngineError(UserError):
    """MinkowskiEngine is missing, does not build, or computes wrongly."""

    exit_code = 1


def install_text(group: str) -> str:
    """What to do about a missing package of an optional group of setup.py. spark_me is on no package index."""
    return f'run `pip install -e ".[{group}]"` in the folder of spark_me\'s setup.py'
