"""Renderers: one file each."""

from reasonrl.renderers.tokens import Tokens

__all__ = ["Tokens"]
