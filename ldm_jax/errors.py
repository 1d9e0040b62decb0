"""The exceptions that are no bug: the input is wrong, or a training run came to nothing."""


class UserError(Exception):
    """Something the user can mend: the message names it and the way out, in one line.

    The command line prints the message without a traceback and exits with code 1.
    """


class Unreachable(UserError):
    """Data that a file system did not give, whatever it holds: it may do so another time."""


class Diverged(Exception):
    """A training run whose numbers are no longer any good: the message says where, and the way out.

    The command line prints the message without a traceback and exits with code 76, which no
    launcher answers with a restart: the same command would end the same way.
    """
