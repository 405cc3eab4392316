"""The locality index: who has how much of a prompt's prefix, and how near."""
