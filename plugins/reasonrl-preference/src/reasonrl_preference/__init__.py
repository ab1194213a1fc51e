"""Judges that people's preferences trained, in [0, 1]: HPSv2.1, PickScore, CLIPScore and the aesthetic predictor."""

from reasonrl_preference.judges import HPS, Aesthetic, ClipScore, PickScore

__all__ = ["HPS", "Aesthetic", "ClipScore", "PickScore"]
