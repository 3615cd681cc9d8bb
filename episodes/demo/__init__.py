"""The demo data set: moving shapes, rendered as video files."""
