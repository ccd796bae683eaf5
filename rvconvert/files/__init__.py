"""Files: checkpoints in and out, and the recipe that a converted one carries."""
