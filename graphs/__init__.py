"""Capture mode: a recorded training step, optimised and replayed. Nothing is here yet."""
