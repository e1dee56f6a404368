"""Every loss from the command line: on the same rollouts, on the same pairs, alone and in sums."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import ROOT, even, rows_of  # noqa: F401  `test_cli.even` is named in the runs below

from lit_grpo.__main__ import main

ONLINE = ["GRPO", "TwoGRPO", "DAPO", "RLOO", "Reinforce", "GSPO", "CISPO", "DPO", "IPO", "Hinge", "SimPO", "ORPO"]
ONLINE += ["KTO", "APOZero", "SFT", "KL", "{class_path: DrGRPO, init_args: {length: 5}}"]
ONLINE += ["{class_path: WeightedSum, init_args: {losses: [DPO, SFT], weights: [1.0, 0.2]}}"]
OFFLINE = [loss for loss in ONLINE if loss not in ("KL",)] + ["AdaptiveGRPO"]

SUM = """
model:
  loss:
    class_path: WeightedSum
    init_args:
      losses:
        - {class_path: TwoGRPO, init_args: {clip_high: 0.28}}
        - {class_path: KL, init_args: {estimator: k3_ratio}}
      weights:
        - 1.0
        - {class_path: LinearSchedule, init_args: {start: 0.1, end: 0.0, steps: 4}}
"""


def train(config: str, model: str, task: Path, folder: Path, *arguments: str) -> Path:
    """Run two short epochs and return their folder."""
    name = {"quickstart.yaml": "train"}.get(config, "pairs")
    (folder / "data.jsonl").write_text("\n".join((task / f"{name}.jsonl").read_text().splitlines()[:16]))
    main(
        [
            "fit",
            f"--config={ROOT / 'configs' / config}",
            f"--run_dir={folder / 'run'}",
            f"--model.model={model}",
            "--data.reward=test_cli.even",
            "--data.val=null",
            f"--data.train.path={folder / 'data.jsonl'}",
            "--samples.every_n_phases=1",
            "--trainer.max_epochs=2",
            "--trainer.enable_progress_bar=false",
            *arguments,
        ]
    )
    return folder / "run"


@pytest.fixture(scope="module")
def rollouts(task: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the untrained policy writes in the first phase, whatever loss will read it."""
    run = train("quickstart.yaml", model, task, tmp_path_factory.mktemp("run"), "--data.prompts_per_phase=8")
    return (run / "samples" / "train-00000.jsonl").read_text()


@pytest.mark.parametrize("loss", ONLINE)
def test_any_loss_trains_on_the_same_rollouts(loss: str, rollouts: str, task: Path, model: str, tmp_path: Path):
    run = train("quickstart.yaml", model, task, tmp_path, f"--model.loss={loss}", "--data.prompts_per_phase=8")
    assert (run / "samples" / "train-00000.jsonl").read_text() == rollouts
    assert len(rows_of(run)) == 2
    assert (run / "pretrained" / "model.safetensors").exists()


@pytest.mark.parametrize("loss", OFFLINE)
def test_any_loss_trains_on_the_same_pairs(loss: str, task: Path, model: str, tmp_path: Path):
    run = train("offline/dpo.yaml", model, task, tmp_path, f"--model.loss={loss}", "--data.batch_size=8")
    rows = rows_of(run)
    assert len(rows) == 2
    assert float(rows[0]["train/informative_share"]) == 1
    assert float(rows[0]["train/grad_norm"]) > 0


@pytest.mark.parametrize(
    ("config", "loss", "defaults"),
    [
        ("offline/dpo.yaml", "SimPO", "beta: 2.0"),
        ("offline/dpo.yaml", "TwoGRPO", "beta: 0.0"),
        ("paper/2grpo.yaml", "GSPO", "clip_high: 0.0004"),
    ],
)
def test_another_loss_starts_from_its_own_defaults(
    config: str, loss: str, defaults: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["fit", f"--config={ROOT / 'configs' / config}", f"--model.loss={loss}", "--print_config"])
    assert defaults in capsys.readouterr().out


def test_a_sum_with_a_schedule_from_yaml(task: Path, model: str, tmp_path: Path):
    (tmp_path / "sum.yaml").write_text(SUM)
    run = train(
        "quickstart.yaml", model, task, tmp_path, f"--config={tmp_path / 'sum.yaml'}", "--data.prompts_per_phase=8"
    )
    first, second = rows_of(run)
    assert float(first["train/loss_KL"]) == 0  # the policy is the reference
    expected = float(second["train/loss_TwoGRPO"]) + 0.075 * float(second["train/loss_KL"])
    assert float(second["train/loss"]) == pytest.approx(expected, rel=1e-4)
    assert "LinearSchedule" in (run / "config.yaml").read_text()


def test_labels_train_kto_and_are_no_pairs(task: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = (task / "labels.jsonl").read_text().splitlines()[:256]
    (tmp_path / "labels.jsonl").write_text("\n".join(rows))
    labels = [f"--data.train.path={tmp_path / 'labels.jsonl'}", "--data.batch_size=256"]
    with pytest.raises(SystemExit):
        train("offline/dpo.yaml", model, task, tmp_path, *labels)
    said = capsys.readouterr().err
    assert "DPO cannot train on the labelled completions of" in said
    assert "Single completions train with SFT, KTO or APOZero" in said
    kto = f"--config={ROOT / 'configs' / 'offline' / 'kto.yaml'}"
    run = train("offline/dpo.yaml", model, task, tmp_path, kto, *labels, "--trainer.max_epochs=1")
    share = sum(json.loads(row)["label"] for row in rows) / len(rows)
    assert float(rows_of(run)[0]["train/desirable_share"]) == pytest.approx(share)
    assert 0.2 < share < 0.4


def test_the_settings_of_the_loss_are_printed(task: Path, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train("offline/dpo.yaml", model, task, tmp_path, "--model.loss=IPO", "--data.batch_size=8")
    assert "Loss: IPO(tie_tolerance=0.0, beta=0.1, log_ratios=mean)" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.loss=GRPO", "--model.loss.kl=k1"], "k1 .* cannot be a loss term"),
        (["--model.loss=DrGRPO"], "length"),
        (
            ["--model.loss={class_path: WeightedSum, init_args: {losses: [DPO, GRPO]}}", "--data.group_size=4"],
            "added up",
        ),
        (["--model.loss=DPO", "--model.loss.beta=0"], "beta: expected a number > 0"),
        (["--model.loss=AdaptiveGRPO"], "draws 2 completions .* Set group_size to 3 or more"),
        (["--model.loss=DPO", "--data.group_size=1"], "DPO compares two completions .* group_size of 2 or more"),
    ],
)
def test_mistakes_are_said_before_any_weights_are_loaded(
    arguments: list[str],
    message: str,
    task: Path,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("lit_grpo.module.load_policy", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stop:
        train("quickstart.yaml", model, task, tmp_path, *arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    assert re.search(message, said), said
