"""What the commands share. Imports no torch."""
