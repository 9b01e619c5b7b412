"""Writing: files, data files, and publishing atomically. Knows no live state and no ranks."""
