"""The root of the exception tree; it lives in the lowest package so that all can extend it."""

from __future__ import annotations


class FlexrunError(Exception):
    """Base of every error this project raises on purpose.

    `hint` is the next step for the person who reads the message; it is printed after a blank line.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class QuantizationError(FlexrunError):
    """Values that no code stands for."""
