"""The laws of the world: drawn, and measured."""
