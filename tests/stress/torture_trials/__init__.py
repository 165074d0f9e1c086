"""Trials that try to lose a run: kills, power loss, full disks, damaged files. `scripts/torture --help` runs them."""
