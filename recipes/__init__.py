"""Training recipes: PPO that keeps its critic, heads on a frozen trunk, the embedded models."""
