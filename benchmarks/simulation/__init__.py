"""A cluster of engines that serve a trace, and the policies that route it. Nothing here is measured."""
