"""Dropout that draws the numbers of the library's generator."""
