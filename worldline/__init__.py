"""Learns world models from robot video and uses them in place of the robot."""

__version__ = "0.1.0"
