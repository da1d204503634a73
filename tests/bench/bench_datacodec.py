"""What ``results = "data"`` costs against pickle protocol 5.

    python tests/bench/bench_datacodec.py [--json]

Both encode and decode the same value, interleaved in one run, with buffers out
of band on both sides. A ratio above 1 is what safety costs. Numbers are medians.
"""

from __future__ import annotations

import gc
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from raysandbox import datacodec


def values() -> dict[str, Any]:
    """Return what is measured, by name."""
    million = range(1_000_000)
    frame = pd.DataFrame(
        np.random.default_rng(1).random((100_000, 10)),
        columns=[f"c{n}" for n in range(10)],
    )
    frame["s"] = [str(n) for n in range(len(frame))]
    records = [
        {"id": n, "name": f"n{n}", "score": n * 0.5, "tags": ["a", "b"]}
        for n in range(100_000)
    ]
    return {
        "None": None,
        "small dict": {"a": 1, "b": [1, 2, 3], "c": "text"},
        "1M ints": list(million),
        "1M floats": [float(n) for n in million],
        "1M strings": [str(n) for n in million],
        "dict of 1M": {str(n): n for n in million},
        "100k records": records,
        "100k tuples": [(n, n * 0.5, "x") for n in range(100_000)],
        "100 MB array": np.zeros(12_500_000),
        "10k small arrays": [np.arange(10) for _ in range(10_000)],
        "frame 100k x 11": frame,
        "table 100k x 11": pa.Table.from_pandas(frame),
    }


def by_data(value: Any) -> Callable[[], Any]:
    """Encode now; return the decoding."""
    parts = datacodec.encode(value)
    return lambda: datacodec.decode(parts)


def by_pickle(value: Any) -> Callable[[], Any]:
    """Pickle now; return the unpickling."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, 5, buffer_callback=buffers.append)
    return lambda: pickle.loads(stream, buffers=buffers)


def measure(value: Any, budget_s: float = 1.5) -> dict[str, float]:
    """Run both in turn until the time is used up; return medians in ms."""
    times: dict[str, list[float]] = {}
    until = time.monotonic() + budget_s
    while time.monotonic() < until or len(times["pickle decode"]) < 3:
        for name, make in (("data", by_data), ("pickle", by_pickle)):
            gc.collect()
            began = time.perf_counter()
            read = make(value)
            middle = time.perf_counter()
            read()
            ended = time.perf_counter()
            times.setdefault(f"{name} encode", []).append(middle - began)
            times.setdefault(f"{name} decode", []).append(ended - middle)
    return {name: statistics.median(all_s) * 1e3 for name, all_s in times.items()}


def main() -> None:
    """Measure each value and print one line, or one JSON list, for all."""
    rows = []
    for name, value in values().items():
        row: dict[str, Any] = {"name": name, "unit": "ms", **measure(value)}
        data = row["data encode"] + row["data decode"]
        row["ratio"] = data / (row["pickle encode"] + row["pickle decode"])
        rows.append(row)
        if "--json" not in sys.argv:
            print(
                f"{name:16} data {row['data encode']:9.3f} + {row['data decode']:9.3f}"
                f"  pickle {row['pickle encode']:9.3f} + {row['pickle decode']:8.3f} ms"
                f"   ratio {row['ratio']:6.2f}"
            )
    if "--json" in sys.argv:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
