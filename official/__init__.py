"""All that concerns somebody else's weights."""
