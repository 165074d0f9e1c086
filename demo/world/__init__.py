"""The procedural world of the demo: drawn by `world`, widened by `wider`, judged from pixels by `judge`."""
