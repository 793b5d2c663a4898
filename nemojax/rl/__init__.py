"""Reinforcement learning from verifiable rewards: the training loop, with batches that are sampled."""
