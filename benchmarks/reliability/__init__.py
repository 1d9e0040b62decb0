"""What a run survives, proven at toy size; `python -m benchmarks.reliability --help` says how."""
