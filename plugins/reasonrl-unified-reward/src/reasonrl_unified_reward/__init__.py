"""UnifiedReward (arXiv 2503.05236, 2505.03318) as judges: marks for one picture, and win rates within a group."""

from reasonrl_unified_reward.pairwise import UnifiedRewardPairwise
from reasonrl_unified_reward.pointwise import UnifiedReward

__all__ = ["UnifiedReward", "UnifiedRewardPairwise"]
