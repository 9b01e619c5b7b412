"""The native format, version 1. docs/format.md specifies it."""
