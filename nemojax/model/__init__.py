"""The Llama family as pure functions of an ArchSpec."""
