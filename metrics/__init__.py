"""How near two sets of images are, by their features: distances, precision and recall; torch only."""
