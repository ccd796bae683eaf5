"""Differential fuzzing: random decoders, a slow reference that propagates moments through them, and what is compared."""
