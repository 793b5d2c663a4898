"""Distillation: a child learns from its parent, both in one program."""
