"""From a checkpoint into live state, in place."""
