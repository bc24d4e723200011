"""`import hesse` is light."""

import json
import subprocess
import sys

HEAVY = ["matplotlib", "sklearn", "scipy", "click", "safetensors", "tqdm", "torch._dynamo", "networkx"]
SCRIPT = """
import gc, json, sys, time
import torch
gc.collect()  # of what torch left, which is not ours to count
before = set(sys.modules)
start = time.process_time()
import hesse
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_import_adds_little_to_torch():
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert min(seconds for seconds, _ in runs) < 0.2
    loaded = set(runs[0][1])
    assert not loaded.intersection(HEAVY)


def test_public_names():
    import hesse

    assert hesse.__all__ == sorted(hesse.__all__)
    for name in hesse.__all__:
        assert getattr(hesse, name).__doc__, name
