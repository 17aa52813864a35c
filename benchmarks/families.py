"""Every registered family trained for a few steps at a small size on a GPU, with its own kernels.

    python benchmarks/families.py [--families gla,mamba2] [--at-once 6] [--steps 50] [--json FILE]

Each is a `flame train` of its own, four layers wide enough for the kernels, on this machine's own source
files as text; some run at once, so speeds are no measurement. Prints a line a family, and one JSON object:
the mean loss of the first and of the last five steps, whether it fell, seconds to the first step, memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w
import torch
from text import prepare
from transformers import CONFIG_MAPPING

from flame.environment import environment
from flame.models.registry import families
from flame.train.journal import read_lines

HIDDEN, LAYERS, VOCABULARY = 512, 4, 8192
# heads of 64 or 128 channels; what is not named is the family's own default
HEADS: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 4},
    "gated_deltanet": {"num_heads": 4, "head_dim": 128, "expand_v": 1},
    "delta_net": {"num_heads": 4},
    "gated_deltaproduct": {"num_heads": 4, "head_dim": 128, "expand_v": 1},
    "kda": {"num_heads": 4, "head_dim": 128, "expand_v": 1},
    "comba": {"num_heads": 4, "head_dim": 128, "expand_v": 1},
    "mamba2": {"num_heads": 16, "head_dim": 64},
    "retnet": {"num_heads": 4},
    "linear_attn": {"num_heads": 4},
    "hgrn2": {"expand_ratio": 128},
    "gsa": {"num_heads": 4, "num_slots": 64},
    "rwkv6": {"num_heads": 4},
    "rwkv7": {"head_dim": 64},
    "lightnet": {"expand_ratio": 128},
    "forgetting_transformer": {"num_heads": 8},
    "transformer": {"num_heads": 8},
}
CAUSAL = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 4 * HIDDEN // 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", default="", help="names with commas; left out: all")
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a family may take")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flame-families"))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    text, tokenizer = prepare(options.folder, int(10e6), VOCABULARY)
    names = [n for n in options.families.split(",") if n] or [family.name for family in families()]

    def one(name: str) -> dict[str, Any]:
        found = train(name, text, tokenizer, options)
        first, last = (f"{found[k]:.3f}" if k in found else "-" for k in ("first_loss", "last_loss"))
        told = found.get("error") or f"{first} to {last}, first step after {found['first_step_seconds']} s"
        print(f"{name:<24} {told}", flush=True)
        return found

    with ThreadPoolExecutor(options.at_once) as pool:
        records = list(pool.map(one, names))
    told = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result = {name: told[name] for name in ("device", "cuda", "python", "packages")}
    result |= {"steps": options.steps, "hidden": HIDDEN, "layers": LAYERS, "families": records}
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def config_of(name: str) -> dict[str, Any]:
    """The small config of a family."""
    model_type = next(family.model_types[0] for family in families() if family.name == name)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    known = CONFIG_MAPPING[model_type]().to_dict()
    if name == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 8, "vocab_size": VOCABULARY}
        sizes |= {"n_positions": 2048, "bos_token_id": 0, "eos_token_id": 0}
        sizes |= dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0)
    elif name not in HEADS and "num_attention_heads" in known:
        sizes |= {key: value for key, value in CAUSAL.items() if key in known or key == "head_dim"}
        sizes |= {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    values = {"model_type": model_type, **sizes, **HEADS.get(name, {})}
    return json.loads(CONFIG_MAPPING[model_type].from_dict(values).to_json_string(use_diff=False))


def train(name: str, text: Path, tokenizer: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One family's record; `error` says what went wrong."""
    run = options.folder / "runs" / name
    run.parent.mkdir(exist_ok=True)
    config = options.folder / f"{name}.json"
    try:
        config.write_text(json.dumps(config_of(name)))
    except Exception as error:  # a config class raises whatever it likes
        return {"family": name, "error": f"{type(error).__name__}: {error}"}
    recipe = {
        "run": {"directory": str(run), "steps": options.steps},
        "model": {"config": str(config)},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"sequence_length": 2048, "sources": [{"name": "code", "files": [str(text)]}]},
        "batch": {"tokens_per_step": 16384},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup": "5 steps"},
        "logging": {"tensorboard": False},
    }
    path = options.folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(recipe))
    log = run.with_suffix(".log")
    code, first_step = watched([sys.executable, "-m", "flame", "train", str(path)], run, log, options.limit)
    lines = list(read_lines(run / "metrics.jsonl"))
    record: dict[str, Any] = {"family": name, "steps_made": len(lines)}
    if code != 0 or len(lines) < options.steps:
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        return record | {"error": f"exit {code} after {len(lines)} steps: {' | '.join(tail)[-600:]}"}
    losses = [line["loss"] for line in lines]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    return record | {
        "first_loss": round(first, 4),
        "last_loss": round(last, 4),
        "falls": last < first - 0.5,
        "first_step_seconds": first_step,
        "memory_gib": max(line["memory_gib"] or 0.0 for line in lines),
        "updates_skipped": lines[-1]["updates_skipped"],
    }


def watched(command: list[str], run: Path, log: Path, limit: float) -> tuple[int, float | None]:
    """Runs a training for at most `limit` seconds: its exit code, and the seconds until its first step was
    written down."""
    began, first = time.monotonic(), None
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None and time.monotonic() - began < limit:
            if first is None and (run / "metrics.jsonl").exists():
                first = round(time.monotonic() - began, 1)
            time.sleep(0.1)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.wait(), first


if __name__ == "__main__":
    main()
