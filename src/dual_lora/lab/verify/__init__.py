"""Is an adapter on, is it the one that was trained, and does what is served agree? By log-probabilities."""
