"""The model on the device and one engine step. Knows no HTTP, no scheduling, no agents."""
