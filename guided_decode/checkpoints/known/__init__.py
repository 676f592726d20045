"""Known checkpoints by family; `registry` has them all."""
