"""The daemon's inside: directory, policies, room, store, sessions, server."""
