"""Plans that need a GPU."""
