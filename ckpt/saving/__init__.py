"""From live state to a committed checkpoint."""
