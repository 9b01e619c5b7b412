"""The `ckpt` command: it parses, calls the library, and prints."""
