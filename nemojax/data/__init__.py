"""Text, conversations and problems, turned into packed rows of tokens."""
