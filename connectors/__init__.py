"""What runs inside engines and speaks to the store. None is here yet."""
