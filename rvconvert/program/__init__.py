"""A recorded graph: its plan, and its rewriting to random variables."""
