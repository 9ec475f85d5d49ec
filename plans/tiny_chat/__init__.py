"""Ten questions in the language of `tiny.toml`, as FastChat has its own, with their answers and prompts for a judge."""
