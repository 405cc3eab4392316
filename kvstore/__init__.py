"""A hierarchical KV-cache store for LLM inference: one daemon per GPU node.

Engines import `kvstore.client`; `kvstore serve` runs the daemon. Importing this package imports nothing.
"""
