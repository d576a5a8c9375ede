"""What the commands share: their arguments, and how they end. Imports no torch."""
