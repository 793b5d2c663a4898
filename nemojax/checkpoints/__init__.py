"""What crosses a stage's border: artifacts on disk, and the formats of other people's loaders."""
