"""Connectors: engines on one side, a client of the store on the other."""
