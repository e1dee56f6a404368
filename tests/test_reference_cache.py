"""Log-probs of the reference, computed once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import quiet_trainer

from callbacks import ReferenceCache
from lit_grpo.data import PreferenceData, Preferences, RolloutData, Source
from lit_grpo.errors import UserError
from lit_grpo.losses import DPO, KTO, Loss, SimPO
from lit_grpo.module import PolicyModule


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(i) * (i % 3 + 1)} for i in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def fit(model: str, pairs: str, tmp_path: Path, loss: Loss, path: Path | None, **options) -> PolicyModule:
    module = PolicyModule(model, loss, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    callbacks = [] if path is None else [ReferenceCache(str(path))]
    data = PreferenceData(Preferences(pairs), batch_size=4)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks, **options).fit(module, datamodule=data)
    return module


def weights(module: PolicyModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


@pytest.mark.parametrize("loss", [DPO, KTO])
def test_training_is_the_same_and_the_reference_gone(model: str, pairs: str, tmp_path: Path, loss: type):
    plain = fit(model, pairs, tmp_path, loss(), None)
    made = fit(model, pairs, tmp_path, loss(), tmp_path / "cache" / "reference.safetensors")
    read = fit(model, pairs, tmp_path, loss(), tmp_path / "cache" / "reference.safetensors")
    torch.testing.assert_close(weights(made), weights(plain), rtol=0, atol=1e-6)
    assert torch.equal(weights(read), weights(made))
    assert {m.reference is None for m in (made, read)} == {loss is DPO}  # KTO's baseline needs it in every step


def test_a_second_run_never_loads_the_reference(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit(model, pairs, tmp_path, DPO(), tmp_path / "reference.safetensors")
    monkeypatch.setattr("lit_grpo.module.load_reference", None)
    fit(model, pairs, tmp_path, DPO(beta=0.5), tmp_path / "reference.safetensors")


def test_of_other_data_or_precision_is_refused(model: str, pairs: str, tmp_path: Path):
    path = tmp_path / "reference.safetensors"
    fit(model, pairs, tmp_path, DPO(), path)
    with pytest.raises(UserError, match=r"reference.safetensors' was made from another model, data set or precision"):
        fit(model, pairs, tmp_path, DPO(), path, precision="bf16-mixed")
    Path(pairs).write_text(Path(pairs).read_text().replace('"2"', '"3"'))
    with pytest.raises(UserError, match=r"another model, data set or precision. Name another file, or remove it"):
        fit(model, pairs, tmp_path, DPO(), path)


def test_of_another_model_is_refused(model: str, pairs: str, tmp_path: Path):
    path = tmp_path / "reference.safetensors"
    module = fit(model, pairs, tmp_path, DPO(), path)
    module.policy.lm.save_pretrained(tmp_path / "other")
    module.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was made from another model"):
        fit(str(tmp_path / "other"), pairs, tmp_path, DPO(), path)


def test_weights_are_read_whole(model: str, pairs: str, tmp_path: Path):
    """A change far from the end of the file, its size the same."""
    path = tmp_path / "reference.safetensors"
    fit(model, pairs, tmp_path, DPO(), path)
    lm = PolicyModule(model, DPO())
    from lit_grpo.policy import load_policy

    changed = load_policy(model).lm
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    changed.save_pretrained(tmp_path / "other")
    lm.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was made from another model"):
        fit(str(tmp_path / "other"), pairs, tmp_path, DPO(), path)


def test_a_place_that_cannot_be_written_is_said_first(model: str, pairs: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"ReferenceCache.path: cannot write"):
        fit(model, pairs, tmp_path, DPO(), tmp_path / "file" / "reference.safetensors")


def test_a_broken_file_is_named(model: str, pairs: str, tmp_path: Path):
    (tmp_path / "reference.safetensors").write_text("half")
    with pytest.raises(UserError, match=r"ReferenceCache.path: cannot read .*Remove it"):
        fit(model, pairs, tmp_path, DPO(), tmp_path / "reference.safetensors")


def test_where_there_is_nothing_to_keep(model: str, pairs: str, few_prompts: str, tmp_path: Path):
    with pytest.raises(UserError, match="got PreferenceData and SimPO"):
        fit(model, pairs, tmp_path, SimPO(), tmp_path / "reference.safetensors")
    trainer = quiet_trainer(tmp_path, callbacks=[ReferenceCache(str(tmp_path / "reference.safetensors"))])
    data = RolloutData(Source(few_prompts), prompts_per_phase=4, reward=lambda samples: [0.0] * len(samples))
    with pytest.raises(UserError, match="got RolloutData and DPO"):
        trainer.fit(PolicyModule(model, DPO()), datamodule=data)
