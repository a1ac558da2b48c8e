"""Pure tensor functions of the objectives: advantages, losses, aggregation, KL, filters."""
