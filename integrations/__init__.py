"""Adapters of engines to the core. Importing one loads no model and touches no device."""
