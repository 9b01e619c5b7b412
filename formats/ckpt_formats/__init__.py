"""What a checkpoint is: geometry, manifest, typed values, codecs, byte sources, and the native format.

Knows no ranks, processes or engine, and imports no torch: reading a checkpoint needs numpy alone.
"""
