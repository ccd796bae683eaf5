"""The graph engine: record or trace a method, plan it, rewrite it, run it."""
