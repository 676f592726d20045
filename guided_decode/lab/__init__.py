"""Decoding methods compared, on prompts and with statistics: for now the demo's comparison."""
