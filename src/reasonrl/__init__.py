"""reasonrl: reinforcement learning for models that think before they draw."""
__version__ = "0.1.0"
