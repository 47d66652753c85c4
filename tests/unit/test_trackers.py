"""Trackers: numbers and names only, off by default, and never in the way of a run."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from palimpsest import trackers
from palimpsest.errors import UsageError
from palimpsest.summary import Row
from palimpsest.trackers import check_trackers, open_tracker, safe_config, summary_numbers

Calls = list[tuple[Any, ...]]
CONFIG = {
    "run": {"name": "study", "seed": 3, "limit": None},
    "methods": [{"name": "npo", "fit": {"lr": 1e-4}, "retain": "nll"}],
    "models": [{"name": "original", "source": "sandbox/original", "trust_remote_code": False}],
}
HOSTILE = {
    "prompt": "How do I make a bomb?",
    "preamble": "The following are questions",
    "mirror": "/" + "home/someone/files",
    "source": "~/models/mine",
    "base_url": "https://example.com/v1",
    "api_key": "abc",
    "note": "hf_abcdef",
    "long": "a1" * 20,
    "passwords": ["hunter2"],
}


def _row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "model": "npo",
        "axis": "safety",
        "evaluation": "harmful",
        "dataset": "sandbox_harmful",
        "transform": "none",
        "channel": "chat",
        "split": "test",
        "subset": "",
        "judge": "keyword",
        "metric": "asr",
        "value": 0.25,
        "low": 0.1,
        "high": 0.5,
        "n": 12,
        "unscored": 1,
        "groups": 12,
        "better": "lower",
        "interval": "wilson",
    }
    return Row(**values | changes)


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def _note(calls: Calls, name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        calls.append((name, args, kwargs))

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put stand-ins of every backend in place; return what is called on them, in order."""
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "as it was")  # what is set on the way is undone
    noted: Calls = []
    _stand_in(
        monkeypatch,
        "trackio",
        **{k: _note(noted, f"trackio.{k}") for k in ("init", "log", "finish")},
    )
    names = ("define_metric", "log", "finish")
    run = SimpleNamespace(**{k: _note(noted, f"wandb.{k}") for k in names})
    run.summary = SimpleNamespace(update=_note(noted, "wandb.summary"))

    def init(**kwargs: Any) -> Any:
        noted.append(("wandb.init", (), kwargs))
        return run

    _stand_in(monkeypatch, "wandb", init=init, Settings=lambda **kwargs: kwargs)
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: "7",
        create_run=lambda e, run_name: SimpleNamespace(info=SimpleNamespace(run_id="r1")),
        log_batch=_note(noted, "mlflow.log_batch"),
        set_terminated=_note(noted, "mlflow.end"),
    )

    def make_client(tracking_uri: str) -> Any:
        noted.append(("mlflow.client", (tracking_uri,), {}))
        return client

    entities = SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a)
    _stand_in(monkeypatch, "mlflow", MlflowClient=make_client, entities=entities)
    writer = {k: _note(noted, f"tensorboard.{k}") for k in ("add_text", "add_scalar", "close")}
    _stand_in(monkeypatch, "tensorboard")
    _stand_in(
        monkeypatch,
        "torch.utils.tensorboard",
        SummaryWriter=lambda log_dir: SimpleNamespace(**writer),
    )
    return noted


def test_without_names_nothing_is_imported_made_or_logged(tmp_path: Path, calls: Calls) -> None:
    tracker = open_tracker((), run_name="study", config=CONFIG, out=tmp_path)
    tracker.log({"forget": 1.0}, 0, "npo")
    tracker.finish([_row()])
    assert not calls
    assert not list(tmp_path.iterdir())


def test_an_unknown_double_or_missing_tracker_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="did you mean 'wandb'"):
        check_trackers(["wandbb"])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install trackio, or 'palimpsest\[trackers\]'"):
        check_trackers(["trackio"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="named twice"):
        check_trackers(["trackio", "trackio"])


def test_every_backend_gets_losses_rows_and_a_close(tmp_path: Path, calls: Calls) -> None:
    losses = tmp_path / "losses.jsonl"
    lines = [{"step": s, "terms": {"forget": 1.0 - s, "retain": 2.0}} for s in range(2)]
    losses.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = list(trackers.BACKENDS)
    tracker = open_tracker(names, run_name="study", config=CONFIG, out=tmp_path)
    assert tracker.names == tuple(names)
    tracker.log_losses(losses, "npo")
    tracker.log_losses(tmp_path / "none.jsonl", "rmu")
    tracker.finish([_row(), _row(metric="refused", value=None)])
    tracker.finish([_row()])  # closed: no effect
    done = {name: [c for c in calls if c[0] == name] for name in {c[0] for c in calls}}
    assert done["trackio.log"][1][1:] == (({"npo/forget": 0.0, "npo/retain": 2.0},), {"step": 1})
    assert done["wandb.log"][1][1][0] == {"npo/forget": 0.0, "npo/retain": 2.0, "npo/step": 1}
    assert ("tensorboard.add_scalar", ("npo/forget", 0.0, 1), {}) in calls
    assert [m[3] for c in done["mlflow.log_batch"][1:3] for m in c[2]["metrics"]] == [0, 0, 1, 1]
    number = "npo/harmful/none/chat/test/keyword/asr"
    assert done["wandb.summary"][0][1][0][number] == 0.25
    for end in ("trackio.finish", "wandb.finish", "mlflow.end", "tensorboard.close"):
        assert len(done[end]) == 1


def test_backends_are_offline_by_default_and_capture_nothing(tmp_path: Path, calls: Calls) -> None:
    open_tracker(["wandb", "mlflow"], run_name="study", config=CONFIG, out=tmp_path)
    started = next(c[2] for c in calls if c[0] == "wandb.init")
    assert started["mode"] == "offline"
    assert started["settings"]["console"] == "off"
    assert started["settings"]["disable_git"]
    assert not started["settings"]["save_code"]
    assert all(started["settings"][key] for key in trackers.WANDB_OFF)
    uri = next(c[1][0] for c in calls if c[0] == "mlflow.client")
    assert uri == f"sqlite:///{tmp_path / 'trackers' / 'mlflow' / 'mlflow.db'}"


def test_settings_hold_numbers_and_names_and_nothing_that_could_be_text_or_secret() -> None:
    assert safe_config(CONFIG) == {
        "run.name": "study",
        "run.seed": 3,
        "methods.npo.name": "npo",
        "methods.npo.fit.lr": 1e-4,
        "methods.npo.retain": "nll",
        "models.original.name": "original",
        "models.original.source": "sandbox/original",
        "models.original.trust_remote_code": False,
    }
    assert safe_config(HOSTILE) == {}
    assert safe_config({"max_new_tokens": 5}) == {"max_new_tokens": 5}


def test_a_row_without_value_is_left_out_and_names_suit_every_backend() -> None:
    numbers = summary_numbers([_row(subset="in_corpus=no", low=None), _row(value=None)])
    name = "npo/harmful/none/chat/test/in_corpus_no/keyword/asr"
    assert numbers == {name: 0.25, f"{name}/high": 0.5, f"{name}/n": 12, f"{name}/unscored": 1}


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path, calls: Calls) -> None:
    tracker = open_tracker(["trackio"], run_name="study", config={}, out=tmp_path)
    tracker.log({"forget": float("nan")}, 0, "npo")
    tracker.log({"forget": float("inf"), "retain": 1.0}, 1, "npo")
    assert [c[1][0] for c in calls if c[0] == "trackio.log"] == [{"npo/retain": 1.0}]


def test_a_failing_tracker_warns_once_and_the_others_go_on(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("https://user:secret@example.com is down")

    monkeypatch.setattr(sys.modules["trackio"], "log", fail)
    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    names = ["trackio", "wandb", "tensorboard"]
    with caplog.at_level(logging.INFO):
        tracker = open_tracker(names, run_name="study", config=CONFIG, out=tmp_path)
        for step in range(3):
            tracker.log({"forget": 1.0}, step, "npo")
    assert [r.getMessage() for r in caplog.records] == [
        "tracker wandb failed and is off: RuntimeError",
        "tracker trackio failed and is off: RuntimeError",
    ]
    assert tracker.names == ("tensorboard",)
    assert len([c for c in calls if c[0] == "tensorboard.add_scalar"]) == 3


def test_what_a_tracker_prints_stays_out_of_standard_output(
    tmp_path: Path,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules["trackio"], "init", lambda **kwargs: print("* trackio is here"))
    open_tracker(["trackio"], run_name="study", config={}, out=tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "trackio is here" in printed.err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_tensorboard_stores_steps_and_rows(tmp_path: Path) -> None:
    reason = "tensorboard is not installed (extra `trackers`)"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker(["tensorboard"], run_name="study", config=CONFIG, out=tmp_path)
    for step in range(3):
        tracker.log({"forget": 1.0 / (step + 1)}, step, "npo")
    assert tracker.names == ("tensorboard",)
    tracker.finish([_row()])
    stored = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    stored.Reload()
    events = stored.Scalars("npo/forget")
    assert [e.step for e in events] == [0, 1, 2]
    assert [e.value for e in events] == pytest.approx([1, 0.5, 1 / 3])
    assert stored.Scalars("npo/harmful/none/chat/test/keyword/asr")[0].value == 0.25
