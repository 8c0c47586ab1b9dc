# SPDX-License-Identifier: MIT
"""The errors that a person is meant to read."""


class MergememError(Exception):
    """Something a person can act on.

    The command line prints it without a traceback, as ``mergemem: MESSAGE`` and, on a line of its
    own, the hint. `message` says what is wrong and where; `hint` says what to do about it, and is
    empty where the message leaves no doubt.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep both parts apart, so that callers may add to either."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class ProcessGone(MergememError):
    """The process ended, perhaps this very moment. Never worth more than a counter to the agent."""


class PermissionDenied(MergememError):
    """The kernel does not let this process do that."""
