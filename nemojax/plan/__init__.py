"""Whether a run fits machines that are not at hand, and what it costs there."""
