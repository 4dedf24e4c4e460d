"""Caesura beside other runtimes on this CPU: same checkpoint, same prompts, alternating runs, limits beside.

``python -m benchmarks.peers --scenarios abcde --peers vllm,openvino --json FILE``. What is measured is in
``workload``, what the machine could do in ``roofline``, who takes part in ``systems``, where from in ``environments``.
"""
