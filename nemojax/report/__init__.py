"""The report: one self-contained page about what a pipeline has made."""
