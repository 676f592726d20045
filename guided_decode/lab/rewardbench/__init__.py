"""RewardBench: pairwise accuracy of reward models, critics and implicit rewards."""
