"""Weights as small integers with scales: schemes, the weights themselves, and how scales are found."""
