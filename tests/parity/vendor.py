"""Copies the few cases that come with the tests out of a full pack: `python tests/parity/vendor.py PACK`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent / "goldens"
SAMPLING = (
    *("none-stress", "fora-stress-n3", "none-sharp", "toca-sharp-n3-attention", "duca-sharp-n4-value-norm"),
    *("l2c-hot-t05", "eoc-hot-theta10", "goc-hot-reuse50-eta12", "goc-hot-router-t05-eta08"),
    *("icc-hot-activation-svd-p3", "eb-cache-hot-mixed-d0965", "l2c-uvit-nfe20-t05"),
)
UNITS = ("toca-unit-", "duca-unit-", "l2c-unit-train-soft", "l2c-uvit-unit-train", "icc-unit-")
UNITS += ("dpcache-unit-", "lemica-unit-")
METHODS = ("none", "fora", "toca", "duca", "l2c", "eoc", "goc", "icc", "eb-cache", "dpcache", "lemica")


def main(pack: Path) -> None:
    data = json.loads((pack / "cases.json").read_text(encoding="utf-8"))
    cases = [c for c in data["cases"] if c["id"] in SAMPLING or c["id"].startswith(UNITS)]
    used = {key: {c[key] for c in cases if c.get(key)} for key in ("network", "sampler", "input", "guidance")}
    for table, key in (("networks", "network"), ("samplers", "sampler"), ("inputs", "input"), ("guidance", "guidance")):
        data[table] = {name: entry for name, entry in data[table].items() if name in used[key]}
    data["cases"] = cases
    data["settings_legend"] = {k: v for k, v in data["settings_legend"].items() if k in METHODS}
    data["provenance"] = {k: v for k, v in data["provenance"].items() if k in METHODS}
    files = {entry["file"] for table in ("networks", "inputs") for entry in data[table].values()}
    for case in cases:
        files.add(case["expect"]["file"])
        files |= {entry["file"] for entry in (*case.get("artifacts", {}).values(), *case.get("inputs", {}).values())}
    shutil.rmtree(HERE, ignore_errors=True)
    for file in sorted(files):
        (HERE / file).parent.mkdir(parents=True, exist_ok=True)
        (HERE / file).write_bytes((pack / file).read_bytes())
    (HERE / "cases.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
