"""Rewards: functions from a completion to a number, or None when the verifier itself failed."""
