"""What an int4 checkpoint is: layout, container, manifest and the definition of the numbers (see SPEC.md)."""

__version__ = "0.1.0"
