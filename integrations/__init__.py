"""Adapters of engines to the core; importing one loads no model and no CUDA."""
