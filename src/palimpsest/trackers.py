"""Experiment trackers: losses and summary rows to trackio, wandb, mlflow or TensorBoard. Off by default.

A tracker gets numbers and names: no prompt, no answer, no free text, no secret. It writes into the
run folder or the backend's own local store unless the backend's environment variables name a server
(`WANDB_MODE=online`, `MLFLOW_TRACKING_URI`, `TRACKIO_SPACE_ID`). One that fails never stops a run:
one warning, then it is off.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from palimpsest.errors import UsageError, did_you_mean
from palimpsest.summary import Row

PROJECT = "palimpsest"
WANDB_OFF = (
    "disable_code",
    "disable_git",
    *(f"x_disable_{k}" for k in ("meta", "stats", "machine_info")),
)
"""Settings that keep code, paths, command line, hardware and system load out of a wandb run."""
MLFLOW_BATCH = 100
"""Entries per request; mlflow takes at most 100 parameters and 1,000 metrics at once."""
NOT_IN_NAMES = re.compile(r"[^\w./ -]+", re.ASCII)
PLAIN = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*")
"""A setting that is sent: a name or a relative path. Sentences, addresses and machine paths are not."""
LONGEST_PLAIN = 64
SECRET = re.compile(r"(api_?key|secret|password|credential|authorization|access_?token)", re.I)
TOKENLIKE = re.compile(r"(hf_|sk-|ghp_|xox)|[A-Za-z0-9+]{32,}")

Config = Mapping[str, str | float | bool]

log = logging.getLogger(__name__)


class Backend(Protocol):
    """One tracker that is open."""

    def log(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        """Take the metrics of a step; `prefix` says whose step it is."""

    def finish(self, summary: Mapping[str, float]) -> None:
        """Take the final numbers and close."""


class Tracker:
    """All open trackers; without any, every call does nothing."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        """Refer to backends by name."""
        self._backends = dict(backends)

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers that are still on."""
        return tuple(self._backends)

    def log(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        """Log the finite numbers of a step under `prefix` (a model's name)."""
        named = {_metric_name(k): float(v) for k, v in metrics.items() if math.isfinite(v)}
        if named:
            self._each(lambda backend: backend.log(named, step, _metric_name(prefix)))

    def log_losses(self, path: Path, prefix: str) -> None:
        """Log a training's `losses.jsonl` (`step` and `terms` of each line); no file, no effect."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines if self._backends else []:
            entry = json.loads(line)
            self.log(entry["terms"], int(entry["step"]), prefix)

    def finish(self, rows: Iterable[Row] = ()) -> None:
        """Log the summary's rows and close. A row without value is left out, never 0."""
        numbers = summary_numbers(rows)
        self._each(lambda backend: backend.finish(numbers))
        self._backends.clear()

    def _each(self, call: Callable[[Backend], None]) -> None:
        for name, backend in list(self._backends.items()):
            with _never_stops(name) as is_fine:
                call(backend)
            if not is_fine:
                del self._backends[name]


def open_tracker(
    names: Sequence[str], *, run_name: str, config: Mapping[str, Any], out: Path
) -> Tracker:
    """Return a tracker that writes to all that are named; none is the default and costs nothing.

    Args:
        names: of `BACKENDS`.
        run_name: what the run is called there.
        config: the recipe as plain data; `safe_config` says what of it is sent.
        out: run folder; local backends write below `out/trackers`.

    Raises:
        UsageError: see `check_trackers`. A tracker that cannot be opened is a warning instead.
    """
    check_trackers(names)
    settings = safe_config(config)
    opened: dict[str, Backend] = {}
    for name in names:
        with _never_stops(name):
            folder = out / "trackers" / name
            folder.mkdir(parents=True, exist_ok=True)
            opened[name] = BACKENDS[name](run_name, settings, folder)
    return Tracker(opened)


def check_trackers(names: Sequence[str]) -> None:
    """Check names and installation without importing anything.

    Raises:
        UsageError: unknown tracker, one named twice, or its package is not installed.
    """
    for name in names:
        if name not in BACKENDS:
            raise UsageError(f"[run] unknown tracker {name!r}{did_you_mean(name, BACKENDS)}")
        if list(names).count(name) > 1:
            raise UsageError(f"[run] tracker {name!r} is named twice")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise UsageError(
                f"tracker {name!r} is not installed; pip install {name}, "
                "or 'palimpsest[trackers]' for all of them"
            )


def safe_config(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Return what a tracker may see of a recipe, flattened to dotted names.

    Numbers, booleans, names and relative paths. Left out: free text (it may be a prompt), addresses,
    paths of this machine, and whatever is called or looks like a secret.
    """
    found: dict[str, str | float | bool] = {}
    for key, value in _leaves(config, ""):
        if isinstance(value, (bool, int, float)) or (
            isinstance(value, str) and _is_plain(key, value)
        ):
            found[key] = value
    return found


def summary_numbers(rows: Iterable[Row]) -> dict[str, float]:
    """Return value, low, high, n and unscored of each row by name."""
    numbers: dict[str, float] = {}
    for row in rows:
        if row.value is None:
            continue
        parts = [row.model, row.evaluation, row.transform, row.channel, row.split]
        parts += [p for p in (row.subset, row.judge) if p]
        name = _metric_name("/".join([*parts, row.metric]))
        found = {"": row.value, "/low": row.low, "/high": row.high}
        found |= {"/n": row.n, "/unscored": row.unscored}
        numbers |= {name + k: float(v) for k, v in found.items() if v is not None}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class _Trackio:
    """Local SQLite store of trackio; several models share one run, under their prefixes."""

    def __init__(self, run_name: str, config: Config, folder: Path) -> None:
        self._trackio = importlib.import_module("trackio")
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._trackio.init(project=PROJECT, name=run_name, config=dict(config), **quiet)

    def log(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        self._trackio.log({f"{prefix}/{k}": v for k, v in metrics.items()}, step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        if summary:
            self._trackio.log(dict(summary))
        self._trackio.finish()


class _Wandb:
    """Offline unless `WANDB_MODE` says otherwise; console, code, git and machine are not captured."""

    def __init__(self, run_name: str, config: Config, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = importlib.import_module("wandb")
        quiet = {"console": "off", "silent": True} | dict.fromkeys(WANDB_OFF, True)
        quiet |= {"save_code": False, "x_save_requirements": False}
        self._run = wandb.init(
            project=PROJECT,
            name=run_name,
            config=dict(config),
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(**quiet),
        )
        self._known: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        # wandb drops steps that go back, and each model begins at 0: every prefix has its own axis
        if prefix not in self._known:
            self._run.define_metric(f"{prefix}/step")
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
            self._known.add(prefix)
        self._run.log({f"{prefix}/{k}": v for k, v in metrics.items()} | {f"{prefix}/step": step})

    def finish(self, summary: Mapping[str, float]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class _Mlflow:
    """A client of its own, so that the caller's active run stays; SQLite in the run folder."""

    def __init__(self, run_name: str, config: Config, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        self._mlflow = importlib.import_module("mlflow")
        local = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        self._client = self._mlflow.MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        self._id = self._client.create_run(experiment, run_name=run_name).info.run_id
        params = [self._mlflow.entities.Param(k, str(v)) for k, v in config.items()]
        for i in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[i : i + MLFLOW_BATCH])

    def log(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        now = int(time.time() * 1000)
        made = [
            self._mlflow.entities.Metric(f"{prefix}/{k}" if prefix else k, v, now, step)
            for k, v in metrics.items()
        ]
        for i in range(0, len(made), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=made[i : i + MLFLOW_BATCH])

    def finish(self, summary: Mapping[str, float]) -> None:
        self.log(summary, 0, "")
        self._client.set_terminated(self._id)


class _Tensorboard:
    """Event files in the run folder."""

    def __init__(self, run_name: str, config: Config, folder: Path) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder))
        rows = "\n".join(f"| {k} | {v} |" for k, v in config.items())
        self._writer.add_text(run_name, f"| setting | value |\n| --- | --- |\n{rows}")

    def log(self, metrics: Mapping[str, float], step: int, prefix: str) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{prefix}/{name}" if prefix else name, value, step)

    def finish(self, summary: Mapping[str, float]) -> None:
        self.log(summary, 0, "")
        self._writer.close()


BACKENDS: Mapping[str, Callable[[str, Config, Path], Backend]] = {
    "mlflow": _Mlflow,
    "tensorboard": _Tensorboard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
"""Name (also of the package to install) -> what opens it: (run name, settings, folder)."""


@contextlib.contextmanager
def _never_stops(name: str) -> Iterator[list[bool]]:
    """Turn any error of a tracker into one warning; yields a list that is empty if there was one.

    What a backend prints goes to standard error: standard output is for results.
    """
    is_fine = [True]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield is_fine
    except Exception as error:  # noqa: BLE001 - foreign code beside the run, whatever it raises
        is_fine.clear()
        log.warning("tracker %s failed and is off: %s", name, type(error).__name__)
        log.debug("tracker %s: %s", name, error)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            is_named = isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
            yield from _leaves(entry, f"{path}.{entry['name'] if is_named else i}")
    else:
        yield path, value


def _is_plain(key: str, value: str) -> bool:
    is_name = len(value) <= LONGEST_PLAIN and PLAIN.fullmatch(value) is not None
    return is_name and not SECRET.search(key) and not TOKENLIKE.search(value)


def _metric_name(text: str) -> str:
    """Return a name that every backend takes."""
    return NOT_IN_NAMES.sub("_", text)
