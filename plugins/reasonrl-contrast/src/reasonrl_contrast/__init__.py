"""RMS contrast as a judge: the smallest plugin, to copy from."""

import numpy as np
from attrs import field, frozen, validators

from reasonrl import PointwiseJudge, Trajectory


@frozen
class Contrast(PointwiseJudge):
    """RMS contrast of the image, in [0, 1]; 0 where the policy drew nothing."""

    gain: float = field(default=1.0, validator=validators.gt(0))
    needs = frozenset({"image"})  # no annotation: attrs would make it a field

    def score(self, trajectory: Trajectory) -> float | None:
        """Scores one trajectory: twice the standard deviation of its gray levels, times gain."""
        if trajectory.image is None:
            return None
        gray = np.asarray(trajectory.image.convert("L"), dtype=float) / 255
        return min(1.0, self.gain * 2 * float(gray.std()))
