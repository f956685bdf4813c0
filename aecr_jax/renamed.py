"""The present names of the settings of version 0.1.0, for messages that reject the old names and for reading saved configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPTIM = (
    "steps",
    "batch",
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup",
    "accumulate",
    "ema",
    "freeze_stats_after",
    "offset_rate",
    "clip_norm",
)
_RUN = (
    "workdir",
    "seed",
    "log_every",
    "save_every",
    "eval_every",
    "eval_images",
    "init_from",
    "tensorboard",
    "coordinator",
    "processes",
    "process_id",
)
# Old name -> what to write instead.
RENAMED = {
    **{f"train.{name}": f"optim.{name}" for name in _OPTIM},
    **{f"train.{name}": f"run.{name}" for name in _RUN},
    "data.dataset": "data.train NAME",
    "data.hazy": "data.train HAZY,CLEAR",
    "data.clear": "data.train HAZY,CLEAR or data.train clear=CLEAR,depth=DEPTH",
    "data.depth": "data.train clear=CLEAR,depth=DEPTH",
    "data.eval_dataset": "data.eval NAME",
    "data.eval_hazy": "data.eval HAZY,CLEAR",
    "data.eval_clear": "data.eval HAZY,CLEAR",
    "data.split": "data.train DATA@NAME/train and data.eval DATA@NAME/test",
    "data.scenes": "data.train scenes:COUNT:WIDTHxHEIGHT",
    "data.scene_size": "data.train scenes:COUNT:WIDTHxHEIGHT",
}


def migrate(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved config with the present groups and names; one that already has them is returned as a copy."""
    if "train" not in saved:
        return dict(saved)
    train, data = saved["train"], dict(saved["data"])
    spec = {key: data.pop(key, "") for key in ("dataset", "hazy", "clear", "depth", "eval_dataset", "eval_hazy", "eval_clear", "split")}
    count, (height, width) = data.pop("scenes", 200), data.pop("scene_size", (240, 320))
    if spec["dataset"]:
        source = spec["dataset"]
    elif spec["hazy"]:
        source = f"{spec['hazy']},{spec['clear']}"
    elif spec["depth"]:
        source = f"clear={spec['clear']},depth={spec['depth']}"
    else:
        source = f"scenes:{count}:{width}x{height}"
    evaluation = spec["eval_dataset"] or (f"{spec['eval_hazy']},{spec['eval_clear']}" if spec["eval_hazy"] else "")
    if spec["split"]:
        source, evaluation = f"{source}@{spec['split']}/train", f"{source}@{spec['split']}/test"
    return {
        "model": saved["model"],
        "data": {"train": source, "eval": evaluation, **data},
        "loss": saved["loss"],
        "optim": {name: train[name] for name in _OPTIM if name in train},
        "run": {name: train[name] for name in _RUN if name in train},
    }
