"""What `make gpu-check` measures, a part a process: see benchmarks/gpu_check.py."""
