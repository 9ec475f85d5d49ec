"""Plans that measure what the paper reports."""
