"""Stages of ``python -m benchmarks.gpu_check``: each a process of its own, so that one's failure is not another's."""
