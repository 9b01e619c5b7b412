"""From checkpoint to checkpoint, streaming: loading's reading and saving's writing."""
