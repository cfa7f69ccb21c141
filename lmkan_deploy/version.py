"""The release; CMake reads it from here too."""

__version__ = "0.1.0"
