"""The teacher: a vision-language model and its maps."""
