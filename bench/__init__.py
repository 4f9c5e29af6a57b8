"""Benchmarks: one file per question, run by `longtrace bench NAME`."""
