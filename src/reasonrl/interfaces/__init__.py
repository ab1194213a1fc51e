"""The four abstract interfaces (Policy, Renderer, Judge, Objective) and the two roles beside them."""

from reasonrl.interfaces.judge import Judge, PointwiseJudge
from reasonrl.interfaces.objective import Objective
from reasonrl.interfaces.policy import Policy, Teachable
from reasonrl.interfaces.renderer import Renderer
from reasonrl.interfaces.trainable import Trainable

__all__ = ["Judge", "Objective", "PointwiseJudge", "Policy", "Renderer", "Teachable", "Trainable"]
