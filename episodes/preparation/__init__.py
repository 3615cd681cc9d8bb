"""From raw downloads to checked, fast training data."""
