"""The plans that ship with the package; `tiny.toml` is the default."""
