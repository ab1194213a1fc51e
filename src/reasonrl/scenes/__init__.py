"""The drawn world: prompts, plans and images whose truth can be counted, on 64x64 pixels, offline.

`world` draws, `codec` turns images into 64 tokens and back, `parser` reads them exactly, `grammar`
reads prompts, `truth` compares, `compose` is the imperfect teacher, `splits` holds the prompts.
"""

from reasonrl.scenes.compose import Demonstration, Faults, demonstration
from reasonrl.scenes.grammar import Request, Wanted, parse_prompt, write_prompt
from reasonrl.scenes.world import Scene, SceneObject, draw

__all__ = [
    "Demonstration",
    "Faults",
    "Request",
    "Scene",
    "SceneObject",
    "Wanted",
    "demonstration",
    "draw",
    "parse_prompt",
    "write_prompt",
]
