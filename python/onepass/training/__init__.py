"""What every system's training command shares."""
