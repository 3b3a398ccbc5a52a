"""The picture prior: a small text-to-image network of emoji in three drawing styles, trained here from nothing."""
