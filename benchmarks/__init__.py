"""Our figures beside physical limits and peers: `python -m benchmarks NAME`. Not part of the distribution."""
