"""The trainer: one loop (`train.py`), objectives, traces, checkpoints and the `longtrace` command line."""
