"""Capture: one real run of a method becomes an fx.Graph that any later run replays."""
