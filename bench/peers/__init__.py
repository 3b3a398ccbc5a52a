"""A training step beside those of other trainers, whose code is fetched by the one who runs it."""
