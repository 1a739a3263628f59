"""Models that are spread: over processes, over memories, and over modules that read each other's weights."""
