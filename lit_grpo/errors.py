"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the configuration, the data or the user's own code.

    Its message names the YAML key, what came, what was expected and how to fix it. The command line prints the message
    without a traceback; every other exception is a bug of this project and keeps its traceback.
    """
