"""The one exception for mistakes that a user can make and mend."""


class UserError(Exception):
    """A mistake in the user's config, data or files, told in one sentence a problem.

    The message says what was expected, what was found (path, key, class) and what to do next.
    The commands print it without a traceback and leave with exit code 2.
    """
