"""One module per kernel; each agrees with `formats.codec` within the rounding of its accumulation."""
