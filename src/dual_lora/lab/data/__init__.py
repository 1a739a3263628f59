"""Records, from files to batches: records (read), examples (formats), token ids (encode), batches in order
(batches)."""
