"""Attention on Hopper tensor cores."""
