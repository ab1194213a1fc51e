"""Any judge on a pool of Ray actors. Importing it does not import ray; the first judgement does."""

from reasonrl_ray.judge import OnRay

__all__ = ["OnRay"]
