"""`ckpt demo`: train, save, lose a worker, recover on another mesh, reshard, and prove that nothing was lost."""
