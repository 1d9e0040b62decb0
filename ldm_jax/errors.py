"""The one exception that means "the input is wrong", as opposed to a bug."""


class UserError(Exception):
    """Something the user can mend: the message names it and the way out, in one line.

    The command line prints the message without a traceback and exits with code 1.
    """
