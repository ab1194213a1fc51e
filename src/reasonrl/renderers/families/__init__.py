"""Families: one adapter a kind of diffusers pipeline; entry points of the group `reasonrl.families` name them."""
