"""Losses on arrays: sums over tokens with their weights, never means, so that any split adds up."""
