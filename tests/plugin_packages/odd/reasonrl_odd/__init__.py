"""Offers things of the wrong type."""

TEXT = "hello"


class Unrelated:
    pass
