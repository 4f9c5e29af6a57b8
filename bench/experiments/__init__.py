"""Scaled-down experiments: each prints checks that hold or fail and exits non-zero if one fails."""
