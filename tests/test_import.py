"""`import hesse` is light."""

import json
import subprocess
import sys

HEAVY = ["matplotlib", "sklearn", "scipy", "click", "safetensors", "tqdm", "torch._dynamo", "networkx"]
SCRIPT = """
import gc, json, sys, time
began = time.process_time()
import torch
whole = time.process_time() - began
gc.collect()  # of what torch left, which is not ours to count
before = set(sys.modules)
start = time.process_time()
import hesse
print(json.dumps([(time.process_time() - start) / whole, sorted(set(sys.modules) - before)]))
"""


def test_import_adds_little_to_torch():
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert min(share for share, _ in runs) < 1 / 3  # of what torch takes, however fast the machine is
    loaded = set(runs[0][1])
    assert not loaded.intersection(HEAVY)


def test_public_names():
    import hesse

    assert hesse.__all__ == sorted(hesse.__all__)
    for name in hesse.__all__:
        assert getattr(hesse, name).__doc__, name
