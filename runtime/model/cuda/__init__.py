"""The decoder on a GPU: FlashInfer's kernels where they can be had, torch's everywhere else, shards of one model.

Everything here also runs on a CPU, where it is slower than ``native`` and serves to test what a GPU will do.
"""
