"""How good a model and its chains are."""
