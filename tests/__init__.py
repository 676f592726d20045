from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which something that a test waits for hangs, on however slow a machine.
PATIENCE = 1200
