"""Small networks with planted dead structure, whose reduced size is known exactly."""
