"""Products of a few rows with large weights, and what stands around them in a layer."""
