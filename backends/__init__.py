"""The models: one hybrid decoder, its mixers, conversion from a teacher, checkpoints and the stepping engine.

Importing this package imports no torch; `mambabench.backends.model` registers the model with transformers.
"""
