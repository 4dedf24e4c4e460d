"""Have FlashInfer's kernels compiled, all at once: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.gpu.common import report

_USES = {  # what makes FlashInfer compile and load a module
    "attention of 128": "prefill(128)",
    "attention of 64": "prefill(64)",
    "attention of 128, windowed": "prefill(128, 49)",
    "norms": "flashinfer.rmsnorm(rows(256), rows(256)[0])",
    "rotary": (
        "flashinfer.apply_rope_with_cos_sin_cache_inplace(torch.zeros(4, dtype=torch.int64, device='cuda'), "
        "rows(256), rows(256), 128, torch.ones(8, 128, device='cuda'))"
    ),
    "activation": "flashinfer.silu_and_mul(rows(256))",
    "merging": "flashinfer.merge_state(heads(), lse(), heads(), lse())",
    "thresholds": "flashinfer.top_p_renorm_probs(torch.ones(4, 512, device='cuda') / 512, 0.9)",
}
_PREAMBLE = """
import torch, flashinfer
def rows(n): return torch.ones(4, n, dtype=torch.bfloat16, device="cuda")
def heads(): return torch.ones(4, 8, 128, dtype=torch.bfloat16, device="cuda")
def lse(): return torch.zeros(4, 8, dtype=torch.float32, device="cuda")
def prefill(size, window=-1):
    space = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa2")
    ends = torch.tensor([0, 1], dtype=torch.int32)
    pages = torch.zeros(1, dtype=torch.int32, device="cuda")
    wrapper.plan(ends, ends, pages, ends[1:], 8, 2, size, 16, causal=True, window_left=window,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    cache = torch.zeros(1, 16, 2, size, dtype=torch.bfloat16, device="cuda")
    wrapper.run(torch.ones(1, 8, size, dtype=torch.bfloat16, device="cuda"), (cache, cache))
"""


def main() -> None:
    """Compile everything side by side; a failure is told by name."""
    begun = time.perf_counter()
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"{_PREAMBLE}{use}\ntorch.cuda.synchronize()"], stderr=subprocess.PIPE, text=True
        )
        for name, use in _USES.items()
    }
    for name, process in running.items():
        _, errors = process.communicate()
        if process.returncode:
            print(errors[-3000:], flush=True)
            report(f"kernels: {name}", "FAILED", errors.strip().splitlines()[-1][:120] if errors.strip() else "")
    report("kernels compiled", time.perf_counter() - begun, "s")


if __name__ == "__main__":
    main()
