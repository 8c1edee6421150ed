"""The one exception that means "the user can put this right"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is the one line shown, with exit code 2: it names the value, what is accepted, what to do."""
