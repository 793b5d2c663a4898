"""A model behind the interface that OpenAI's clients speak."""
