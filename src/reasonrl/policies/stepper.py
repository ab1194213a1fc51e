"""Stepper: runs one decoding step again and again; on CUDA as a captured graph, so that Python is not waited for."""

from __future__ import annotations

from collections.abc import Callable

import torch

STRIDE = 64
"""Steps that one captured graph serves: caches are looked at in spans of so many positions."""


class Stepper:
    """Calls `step(bound)`, which changes tensors in place and nothing else; fewer than `bound` steps came before.

    The first call runs eagerly: kernels are compiled and workspaces allocated there. A graph that was captured holds
    the addresses of its tensors: make a new Stepper when they are replaced.
    """

    def __init__(self, step: Callable[[int], None], device: torch.device, *, captures: bool = True) -> None:
        self.step, self.device = step, device
        self.captures = captures and device.type == "cuda"
        self._warm = False
        self._bound = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, before: int) -> None:
        """Runs a step that `before` others came before."""
        if not self.captures:
            self.step(before + 1)
            return
        bound = (before // STRIDE + 1) * STRIDE
        if not self._warm:
            self.step(bound)
            self._warm = True
            return
        if bound != self._bound or self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Judges have threads of their own, and other devices are none of ours.
            stream = torch.cuda.Stream(self.device)
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self.step(bound)
            self._bound = bound
        self._graph.replay()
