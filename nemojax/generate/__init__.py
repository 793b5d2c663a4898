"""Sampling from a model: `engine.generate` is the door; `sampling` is the distribution it draws from."""
