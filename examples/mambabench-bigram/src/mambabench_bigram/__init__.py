"""An example plug-in of mambabench; `plugin` is its entry point."""
