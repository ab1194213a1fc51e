"""Objectives: one file each."""

from reasonrl.objectives.advantage_regression import AdvantageWeighted
from reasonrl.objectives.denoising_grpo import DenoisingGRPO
from reasonrl.objectives.diffusion_dpo import DiffusionDPO
from reasonrl.objectives.diffusion_nft import DiffusionNFT
from reasonrl.objectives.grpo import GRPO
from reasonrl.objectives.supervised import Supervised

__all__ = ["GRPO", "AdvantageWeighted", "DenoisingGRPO", "DiffusionDPO", "DiffusionNFT", "Supervised"]
