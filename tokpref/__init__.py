"""Preference optimisation of language models, token by token."""

__version__ = "0.1.0"
