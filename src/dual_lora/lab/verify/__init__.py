"""Is an adapter on, is it the one that was trained, and does what is served agree? Judged by log-probabilities."""
