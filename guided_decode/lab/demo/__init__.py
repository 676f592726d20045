"""The demo: decoding methods compared on tiny-tulu's held-out prompts."""
