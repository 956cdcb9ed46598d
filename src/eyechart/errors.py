"""What can go wrong, in words that say what to do about it.

Every error eyechart raises on purpose derives from :class:`EyechartError`. The command line prints
its message without a traceback and leaves with :attr:`EyechartError.exit_status`: 2 where the call
was wrong, 1 where the model or the data failed.
"""


class EyechartError(Exception):
    """Base of all deliberate errors; its message is meant to be read by the user."""

    exit_status = 1


class UsageError(EyechartError, ValueError):
    """An argument cannot be honoured whatever the model: wrong value, missing device, bad path."""

    exit_status = 2


class UnknownModelError(UsageError):
    """No model goes by that name; the message lists near names."""


class InputError(EyechartError, ValueError):
    """The prompt or token tensor does not fit the model: empty, too long, out of vocabulary."""


class UnsupportedModelError(EyechartError):
    """The model loads but eyechart cannot examine it: not causal, or without attention."""


class NonFiniteError(EyechartError):
    """NaN or infinity in the weights or in an activation; the message names the layer."""


class DownloadError(EyechartError):
    """A model's files could not be fetched, or what arrived is not what was pinned."""


class CaptureError(EyechartError):
    """A probe did not see what it asked for: a hook that never fired, or a wrong tensor."""


class ResultError(EyechartError):
    """A saved result cannot be opened: missing, incomplete, or of an unknown kind."""


class FallbackWarning(UserWarning):
    """A slower exact way was taken than the one asked for; the result says where and why."""
