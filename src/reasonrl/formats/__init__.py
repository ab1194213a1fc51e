"""Checkpoints as others write them: where their files are, and what their layouts mean."""
