"""Benchmarks, one file a subject: ``python -m benchmarks.NAME [--quick]`` prints a table and, last, one JSON line."""
