"""Settings that the judges share."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = ("float32", "bfloat16", "float16")
"""What weights and pixels are computed in; embeddings and cosines are float32 in any case."""
