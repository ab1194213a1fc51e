from attrs import field, frozen, validators

from reasonrl.interfaces import PointwiseJudge
from reasonrl.types import Trajectory


@frozen
class Sharpness(PointwiseJudge):
    gain: float = field(default=1.0, validator=validators.gt(0))
    label: str = ""

    def score(self, trajectory: Trajectory) -> float | None:
        return self.gain


class Plain(PointwiseJudge):
    def score(self, trajectory: Trajectory) -> float | None:
        return 1.0
