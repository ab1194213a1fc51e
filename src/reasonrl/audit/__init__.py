"""Audit: whether a judge is worth paying for, before money is spent on it. Begin with `exam`."""
