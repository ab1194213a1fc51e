"""Renderers: one file each."""

from reasonrl.renderers.diffusion import Diffusion
from reasonrl.renderers.tokens import Tokens

__all__ = ["Diffusion", "Tokens"]
