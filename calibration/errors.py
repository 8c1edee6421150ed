"""The one exception of calibration."""

from __future__ import annotations


class CalibrationError(Exception):
    """What the user can put right. The message is the one line shown: the value, what is accepted, what to do."""
