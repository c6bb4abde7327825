"""What making an SPD model of a given size takes, computed from its config alone."""
