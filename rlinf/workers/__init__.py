"""Plain classes that run inside worker processes: training, rollout, reward. No Ray in them."""
