"""Which data sets there are, and their number of classes. Imports nothing, so that planning stays fast."""

NAMES: dict[str, int] = {"digits": 10, "larger": 9}
"""Data set -> number of classes."""
