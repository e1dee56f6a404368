"""Offline data: the column layouts of public data sets, chat templates, lengths, mistakes, and the batches of a step."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import quiet_trainer
from test_layouts import OTHER, QUESTION, assistant, user, write

import lit_grpo.data.preferences
from lit_grpo.__main__ import main
from lit_grpo.data import Batch, PreferenceData, Preferences
from lit_grpo.errors import UserError
from lit_grpo.losses import DPO, IPO, KTO, ORPO, SFT, APOZero, Hinge, Loss, SimPO, TwoGRPO, WeightedSum
from lit_grpo.module import PolicyModule
from lit_grpo.quickstart import small_qwen

ROOT = Path(__file__).parent.parent

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2 with a ChatML template that stops at ``<eos>`` and ``<|im_end|>``.

    Its tokens are bytes, except that ``th`` is one token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))  # transformers adds the rest of Qwen's tokenizer
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", chat_template=CHATML
    )
    folder = str(tmp_path_factory.mktemp("chat") / "model")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    lm = small_qwen(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
    )
    lm.generation_config.eos_token_id = [1, 4]
    lm.save_pretrained(folder)
    return folder


def connect(
    data: PreferenceData,
    model: str,
    loss: Loss | None = None,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    jinja: str | None = None,
) -> PreferenceData:
    """Give a data module what it reads of a trainer, as one of ``world`` processes; ``jinja`` is a chat template."""
    module = PolicyModule(model, loss or SFT())
    module.tokenizer.chat_template = jinja or module.tokenizer.chat_template
    data.trainer = SimpleNamespace(
        strategy=None,
        lightning_module=module,
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        limit_train_batches=1.0,
        overfit_batches=0.0,
        current_epoch=0,
    )
    data.setup("fit")
    return data


def load(
    rows: list[dict[str, Any]],
    tmp_path: Path,
    model: str,
    loss: Loss | None = None,
    chat: bool = False,
    columns: dict[str, str] | None = None,
    jinja: str | None = None,
    **options: Any,
) -> PreferenceData:
    """A data module that has read these rows."""
    source = Preferences(write(tmp_path / "rows.jsonl", rows), **(columns or {}))
    data = PreferenceData(source, **({"batch_size": 1, "chat_template": chat} | options))
    return connect(data, model, loss, jinja=jinja)


def texts(data: PreferenceData) -> list[tuple[str, list[str]]]:
    """Prompt and completions of each group as the model sees them, special tokens included."""
    decode = data.trainer.lightning_module.tokenizer.decode
    return [(decode(g.prompt_ids), [decode(c.token_ids) for c in g.completions]) for g in data.groups]


def pieces(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion of each row of some batches."""
    found = []
    for batch in batches:
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
            start, length = int(mask.int().argmax()) + 1, int(mask.sum())
            found.append((tuple(tokens[:start].tolist()), tuple(tokens[start : start + length].tolist())))
    return found


class TestChat:
    @pytest.mark.parametrize("prompt", [QUESTION, OTHER, [user("a"), assistant("b"), user("the=")]])
    @pytest.mark.parametrize("answer", ["4", "the 4", "", "\n4\n"])
    def test_prompt_and_completion_are_the_whole_conversation(
        self, chat_model: str, tmp_path: Path, prompt: list[Any], answer: str
    ):
        rows = [{"prompt": prompt, "chosen": [assistant(answer)], "rejected": [assistant("=")]}]
        data = load(rows, tmp_path, chat_model, chat=True)
        tokenizer = data.trainer.lightning_module.tokenizer
        whole = tokenizer.apply_chat_template([*prompt, assistant(answer)], tokenize=False)
        assert whole.endswith("<|im_end|>\n")
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        group = data.groups[0]
        assert group.prompt_ids + group.completions[0].token_ids == ids[:-1]  # the newline after the stop token is cut
        assert group.rewards == [1.0, 0.0]
        assert not any(completion.truncated for completion in group.completions)

    def test_what_the_model_sees(self, chat_model: str, tmp_path: Path):
        rows = [{"prompt": "2+2?", "completion": "4"}]
        assert texts(load(rows, tmp_path, chat_model, chat=True, template="Q: {prompt}")) == [
            (
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: 2+2?<|im_end|>\n<|im_start|>assistant\n",
                ["4<|im_end|>"],
            )
        ]

    def test_the_system_message_of_a_row_replaces_the_default(self, chat_model: str, tmp_path: Path):
        rows = [{"chosen": [*OTHER, assistant("yes")], "rejected": [*OTHER, assistant("no")]}]
        (prompt, completions), *_ = texts(load(rows, tmp_path, chat_model, chat=True))
        assert prompt == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>"
            "\n<|im_start|>user\nhm?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert completions == ["yes<|im_end|>", "no<|im_end|>"]

    def templated(self, model: str, tmp_path: Path, jinja: str) -> PreferenceData:
        return load([{"prompt": QUESTION, "completion": "4"}], tmp_path, model, chat=True, jinja=jinja)

    def test_a_template_that_writes_the_beginning_of_sequence(self, chat_model: str, tmp_path: Path):
        ids = self.templated(chat_model, tmp_path, "{{ bos_token }}" + CHATML).groups[0]
        assert ids.prompt_ids[0] == 2
        assert [*ids.prompt_ids, *ids.completions[0].token_ids].count(2) == 1  # the tokenizer would add its own

    def test_a_template_without_a_stop_token(self, chat_model: str, tmp_path: Path):
        template = (
            "{% for m in messages %}({{ m.content }}){% endfor %}{% if add_generation_prompt %}{{ '(' }}{% endif %}"
        )
        assert texts(self.templated(chat_model, tmp_path, template)) == [("(2+2?)(", ["4)<eos>"])]

    def test_a_template_that_rewrites_the_prompt(self, chat_model: str, tmp_path: Path):
        template = "{{ messages | length }}" + CHATML
        with pytest.raises(
            UserError, match=r"row 0 of .*: with its completion, the chat template writes the prompt other"
        ):
            self.templated(chat_model, tmp_path, template)

    def test_a_template_that_refuses(self, chat_model: str, tmp_path: Path):
        template = "{{ raise_exception('No system role here') }}"
        with pytest.raises(UserError, match=r"row 0 of .*: the chat template refuses .*: No system role here"):
            self.templated(chat_model, tmp_path, template)

    def test_a_tokenizer_without_a_template(self, model: str, tmp_path: Path):
        with pytest.raises(UserError, match="chat_template: is true, but the model's tokenizer has no chat template"):
            load([{"prompt": "1+1=", "completion": "2"}], tmp_path, model, chat=True)


class TestTokens:
    def test_no_token_spans_prompt_and_completion(self, chat_model: str, tmp_path: Path):
        data = load([{"prompt": "cat", "chosen": "hode", "rejected": "these"}], tmp_path, chat_model)
        tokens = data.trainer.lightning_module.tokenizer.convert_ids_to_tokens
        assert "th" in tokens(data.trainer.lightning_module.tokenizer("cathode")["input_ids"])
        assert tokens(data.groups[0].prompt_ids) == ["<bos>", "c", "a", "t"]
        assert tokens(data.groups[0].completions[0].token_ids) == ["h", "o", "d", "e", "<eos>"]
        assert tokens(data.groups[0].completions[1].token_ids) == ["th", "e", "s", "e", "<eos>"]

    def test_text_ends_with_exactly_one_stop_token(self, chat_model: str, tmp_path: Path):
        answers = ["4", "4<eos>", "4<eos>\n\n", "4<|im_end|>", "4<eos>5"]
        rows = [{"prompt": "2+2=", "completion": answer} for answer in answers]
        completions = [c for _, (c,) in texts(load(rows, tmp_path, chat_model))]
        assert completions == ["4<eos>", "4<eos>", "4<eos>", "4<|im_end|>", "4<eos>5<eos>"]

    def test_long_completions_are_cut_on_both_sides(self, chat_model: str, tmp_path: Path):
        rows = [
            {"prompt": "a", "chosen": "bcdef", "rejected": "b"},
            {"prompt": "a", "chosen": "b", "rejected": "bcdef"},
            {"prompt": "a", "chosen": "bc", "rejected": "cd"},  # with the end of sequence just as long as allowed
        ]
        data = load(rows, tmp_path, chat_model, DPO(), max_completion_tokens=3)
        assert [c for _, c in texts(data)] == [["bcd", "b<eos>"], ["b<eos>", "bcd"], ["bc<eos>", "cd<eos>"]]
        truncated = [[c.truncated for c in group.completions] for group in data.groups]
        assert truncated == [[True, False], [False, True], [False, False]]
        assert data.stats["truncated_share"] == pytest.approx(2 / 6)
        assert data.stats["completion_tokens"] == pytest.approx((3 + 2 + 2 + 3 + 3 + 3) / 6)

    def test_pairs_that_are_or_become_the_same_are_left_out(
        self, chat_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        rows = [
            {"prompt": "a", "chosen": "bcde", "rejected": "bcdf"},
            {"prompt": "a", "chosen": "x", "rejected": "x"},
            {"prompt": "a", "chosen": "c", "rejected": "d"},
        ]
        with caplog.at_level("INFO"):
            data = load(rows, tmp_path, chat_model, DPO(), max_completion_tokens=3)
        assert [c for _, c in texts(data)] == [["c<eos>", "d<eos>"]]
        assert "read 3 pairs" in caplog.text
        assert "left out 2 pairs whose two sides are the same" in caplog.text

    def test_long_prompts_are_left_out(self, chat_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        prompts = ["a" * 3, "a" * 4, "a" * 600]  # one more token is the beginning of the sequence
        with caplog.at_level("INFO"):
            data = load([{"prompt": p, "completion": "b"} for p in prompts], tmp_path, chat_model, max_prompt_tokens=4)
        assert texts(data) == [("<bos>aaa", ["b<eos>"])]
        assert "left out 2 with prompts longer than 4 tokens" in caplog.text

    def test_a_row_beyond_the_context(self, chat_model: str, tmp_path: Path):
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * 509}]
        assert len(load(rows, tmp_path, chat_model, DPO()).groups) == 1  # 512 with both ends
        rows += [{"prompt": "a", "chosen": "b", "rejected": "c" * 510}]
        with pytest.raises(UserError, match=r"row 1 .* 513 tokens.*context of 512.*max_completion_tokens"):
            load(rows, tmp_path, chat_model, DPO())
        assert len(load(rows, tmp_path, chat_model, DPO(), max_completion_tokens=510).groups) == 2

    def test_a_baseline_beyond_the_context(self, chat_model: str, tmp_path: Path):
        rows = [
            {"prompt": "a" * 300, "completion": "b", "label": True},
            {"prompt": "a", "completion": "b" * 300, "label": False},
        ]
        load(rows, tmp_path, chat_model, APOZero(), batch_size=2)
        with pytest.raises(UserError, match=r"model.loss: KTO also reads .* 602 tokens, beyond .* context of 512"):
            load(rows, tmp_path, chat_model, KTO(), batch_size=2)

    def test_a_tokenizer_of_another_model(self, chat_model: str, tmp_path: Path):
        data = PreferenceData(
            Preferences(write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "the"}])), batch_size=1
        )
        module = PolicyModule(chat_model, SFT())
        module.config.vocab_size = 261
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, strategy=None)
        with pytest.raises(UserError, match=r"token 261 of .*row 0.*only 261 tokens"):
            data.setup("fit")

    def test_chunks_change_nothing(self, chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        rows = [{"prompt": f"{i}=", "chosen": str(i), "rejected": "th" * i + "!"} for i in range(10)]
        whole = load(rows, tmp_path, chat_model, DPO()).groups
        monkeypatch.setattr(lit_grpo.data.preferences, "CHUNK", 3)
        assert load(rows, tmp_path, chat_model, DPO()).groups == whole
        assert len(whole) == 10

    def test_progress_is_for_a_terminal(
        self, chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        bar = lit_grpo.data.preferences.tqdm
        monkeypatch.setattr(lit_grpo.data.preferences, "tqdm", lambda **options: bar(**options | {"delay": 0}))
        path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)

        def shown(rank: int) -> str:
            capsys.readouterr()
            connect(PreferenceData(Preferences(path), batch_size=2), chat_model, SFT(), rank, 2)
            return capsys.readouterr().err

        assert "Tokenising" not in shown(rank=0)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        assert "Tokenising" in shown(rank=0)
        assert "Tokenising" not in shown(rank=1)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}

MISTAKES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no such columns": (
        [{"question": "a", "answer": "b"}],
        {},
        r"columns question, answer; expected 'chosen' and 'rejected', or 'completion'",
    ),
    "one side only": ([{"prompt": "a", "chosen": "b"}], {}, "columns prompt, chosen; expected"),
    "a column that was named": (
        [PAIR],
        {"columns": {"prompt": "question"}},
        r"train.prompt: .* no column 'question'; it has prompt, chosen, rejected",
    ),
    "a label that was named": (
        [{"prompt": "a", "completion": "b", "good": True}],
        {"columns": {"label": "god"}},
        r"train.label: .* no column 'god'; it has prompt, completion, good",
    ),
    "an empty cell": ([PAIR, PAIR | {"chosen": ""}], {}, "row 1 .* nothing in column 'chosen'"),
    "an empty prompt": ([PAIR, PAIR | {"prompt": None}], {}, "row 1 .* nothing in column 'prompt'"),
    "an empty list": (
        [PAIR | {"chosen": [], "rejected": [assistant("c")]}],
        {"chat": True},
        "row 0 .* nothing in column 'chosen'",
    ),
    "an empty label": (
        [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": None}],
        {},
        "row 1 .* nothing in column 'label'",
    ),
    "text and messages": (
        [PAIR | {"chosen": [assistant("b")]}],
        {"chat": True},
        "row 0 .* text on one side of the pair and chat messages on the other",
    ),
    "a number": (
        [PAIR | {"chosen": 7, "rejected": 8}],
        {},
        "row 0 .*, column 'chosen', holds 7, expected text or a list",
    ),
    "a list of texts": (
        [PAIR | {"chosen": ["b"], "rejected": ["c"]}],
        {"chat": True},
        "row 0 .*, column 'chosen', holds the chat message 'b', expected a role and a content",
    ),
    "a message without a role": (
        [{"messages": [*QUESTION, assistant("4")]}, {"messages": [{"content": "2+2?"}, assistant("4")]}],
        {"columns": {"completion": "messages"}, "chat": True},
        r"row 1 .*, column 'messages', holds the chat message .*2\+2\?.*, expected a role and a content",
    ),
    "a message without a content": (
        [{"prompt": [{"role": "user"}], "completion": "b"}],
        {"chat": True},
        "row 0 .*, column 'prompt', holds the chat message .*, expected a role and a content",
    ),
    "a message with other keys": (
        [{"prompt": "a", "completion": [{"from": "gpt", "value": "b"}]}],
        {"chat": True},
        "row 0 .*, column 'completion', holds the chat message .*'from': 'gpt'.*, expected a role and a content",
    ),
    "one message without a list": (
        [{"prompt": "a", "completion": assistant("b")}],
        {"chat": True},
        "row 0 .* holds a dict in column 'completion'",
    ),
    "no common words": ([{"chosen": "1+1=2", "rejected": "1+1=3"}], {}, "row 0 .* has no prompt"),
    "no common messages": (
        [{"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}],
        {"chat": True},
        "row 0 .* has no prompt",
    ),
    "a text without a prompt": ([{"completion": "a b c"}], {}, "row 0 .* has no prompt.*Name the column in .prompt"),
    "an answer without a prompt": ([{"completion": [assistant("b")]}], {"chat": True}, "row 0 .* has no prompt"),
    "two turns as a completion": (
        [
            {
                "chosen": [*QUESTION, assistant("4"), user("and 3+3?"), assistant("6")],
                "rejected": [*QUESTION, assistant("5")],
            }
        ],
        {"chat": True},
        "row 0 .* a completion with messages of assistant, user, assistant; expected one, of the assistant",
    ),
    "a question as a completion": (
        [{"completion": [*QUESTION, assistant("4"), user("sure?")]}],
        {"chat": True},
        "row 0 .* a completion with messages of user",
    ),
    "an unknown label": (
        [{"prompt": "a", "completion": "b", "label": "good"}],
        {},
        "row 0 .* label 'good', expected true or false, 1 or 0",
    ),
    "messages without a chat template": (
        [{"prompt": QUESTION, "completion": [assistant("4")]}],
        {},
        "row 0 .* Set data.init_args.chat_template to true",
    ),
    "a completion of messages without a chat template": (
        [{"prompt": "2+2?", "completion": [assistant("4")]}],
        {},
        "row 0 .* chat messages as completions. Set data.init_args.chat_template to true",
    ),
    "nothing to write": ([PAIR], {"max_completion_tokens": 0}, "max_completion_tokens: expected .* >= 1, got 0"),
    "a template without a place": ([PAIR], {"template": "Q:"}, r"template: expected a text that contains {prompt}"),
    "all of them too long": ([PAIR], {"max_prompt_tokens": 1}, "only 0 are left. Lower it, or raise max_prompt_tokens"),
}


class TestMistakes:
    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_end_with_a_message(self, mistake: str, chat_model: str, tmp_path: Path):
        rows, options, message = MISTAKES[mistake]
        with pytest.raises(UserError, match=message):
            load(rows, tmp_path, chat_model, **options)

    def test_a_comparison_of_single_completions(self, chat_model: str, tmp_path: Path):
        rows = [{"prompt": "a", "completion": "b", "label": True}]
        for loss in (DPO(), WeightedSum([SFT(), IPO()])):
            with pytest.raises(UserError) as refusal:
                load(rows, tmp_path, chat_model, loss)
            said = str(refusal.value)
            assert f"model.loss: {type(loss).__name__} cannot train on the labelled completions of" in said
            assert "rows.jsonl" in said
            assert "SFT, KTO or APOZero" in said
            assert "chosen and rejected" in said

    def test_from_the_command_line(self, chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path = write(tmp_path / "rows.jsonl", [{"messages": [*QUESTION, {"role": "assistant"}]}])
        with pytest.raises(SystemExit) as stop:
            main([*self.command(chat_model, tmp_path, path), "--data.train.completion=messages"])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "row 0 of" in said
        assert "column 'messages'" in said
        assert "Traceback" not in said

    def test_none_is_made(self, chat_model: str, tmp_path: Path):
        rows = [{"question": [user(str(i))], "reply": [assistant("th" * i)], "good": i % 2 == 0} for i in range(4)]
        path = write(tmp_path / "rows.parquet", rows)
        columns = [
            f"--data.train.{k}={v}" for k, v in (("prompt", "question"), ("completion", "reply"), ("label", "good"))
        ]
        main([*self.command(chat_model, tmp_path, path), *columns, "--model.loss=KTO"])
        with open(tmp_path / "run" / "metrics.csv", newline="") as file:
            row = next(csv.DictReader(file))
        assert float(row["train/kl_baseline"]) == 0.0  # the policy is still the reference
        assert float(row["train/informative_share"]) == 1.0
        assert (tmp_path / "run" / "pretrained" / "model.safetensors").is_file()

    def command(self, model: str, tmp_path: Path, path: str) -> list[str]:
        return [
            "fit",
            f"--config={ROOT / 'configs' / 'quickstart_warmstart.yaml'}",
            f"--run_dir={tmp_path / 'run'}",
            f"--model.model={model}",
            f"--data.train.path={path}",
            "--data.batch_size=4",
            "--data.chat_template=true",
            "--trainer.max_epochs=1",
        ]


LOSSES: dict[str, Loss] = {
    "DPO": DPO(),
    "IPO": IPO(),
    "KTO": KTO(),
    "APOZero": APOZero(),
    "SimPO": SimPO(),
    "ORPO": ORPO(),
    "Hinge": Hinge(),
    "SFT": SFT(),
    "DPO + SFT": WeightedSum([DPO(), SFT()]),
    "TwoGRPO": TwoGRPO(),
}


class TestGroups:
    PAIRS = tuple({"prompt": f"{i}=", "chosen": str(i), "rejected": "no" * i} for i in range(1, 5))
    LABELLED = tuple({"prompt": f"{i}=", "completion": str(i), "label": i != 2} for i in range(1, 5))

    @pytest.mark.parametrize("name", LOSSES)
    def test_pairs_train_every_loss(self, name: str, chat_model: str, tmp_path: Path):
        module = PolicyModule(chat_model, LOSSES[name], optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        data = PreferenceData(Preferences(write(tmp_path / "pairs.jsonl", list(self.PAIRS))), batch_size=2)
        trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 2
        assert [group.rewards for group in data.groups] == [[1.0, 0.0]] * 4
        assert trainer.callback_metrics["train/grad_norm"] > 0
        assert data.stats["informative_share"] == 1.0

    @pytest.mark.parametrize("name", ["KTO", "APOZero", "SFT"])
    def test_labelled_completions_train(self, name: str, chat_model: str, tmp_path: Path):
        data = load(list(self.LABELLED), tmp_path, chat_model, LOSSES[name], batch_size=4)
        assert [group.rewards for group in data.groups] == [[1.0], [0.0], [1.0], [1.0]]
        (batch,) = data.train_dataloader()
        assert batch.total_rows == 4
        assert batch.total_tokens == 8
        wrong = (*data.groups[1].prompt_ids,)
        found = dict(zip([prompt for prompt, _ in pieces([batch])], batch.advantages.tolist(), strict=True))
        expected = {tuple(g.prompt_ids): 1.0 for g in data.groups} | {wrong: -1.0}
        if name == "SFT":
            del expected[wrong]  # nothing to learn: not even forwarded
        assert found == expected

    def test_pairs_stay_together_with_the_chosen_one_first(self, chat_model: str, tmp_path: Path):
        data = load(list(self.PAIRS), tmp_path, chat_model, DPO(), batch_size=4)
        (batch,) = data.train_dataloader()
        chosen = {tuple(g.prompt_ids): tuple(g.completions[0].token_ids) for g in data.groups}
        rejected = {tuple(g.prompt_ids): tuple(g.completions[1].token_ids) for g in data.groups}
        rows = pieces([batch])
        assert all(completion == chosen[prompt] for prompt, completion in rows[0::2])
        assert all(completion == rejected[prompt] for prompt, completion in rows[1::2])
        assert batch.advantages.tolist() == [1.0, -1.0] * 4
        assert (batch.total_rows, batch.sampler_logps, batch.on_policy) == (8, None, False)

    def test_statistics(self, chat_model: str, tmp_path: Path):
        stats = load(list(self.LABELLED), tmp_path, chat_model, SFT()).stats
        assert stats == pytest.approx(
            {
                "advantage_mean": 3 / 4,
                "advantage_std": (3 / 16) ** 0.5,
                "informative_share": 3 / 4,
                "completion_tokens": 2.0,
                "truncated_share": 0.0,
            }
        )
        stats = load(list(self.PAIRS), tmp_path, chat_model, DPO()).stats
        assert stats == pytest.approx(
            {
                "advantage_mean": 0.0,
                "advantage_std": 1.0,
                "informative_share": 1.0,
                "completion_tokens": (4 * 2 + 3 + 5 + 7 + 9) / 8,
                "truncated_share": 0.0,
            }
        )


class TestBaseline:
    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        """Twelve completions of six prompts, each different."""
        rows = [
            {"prompt": f"{i % 6}=", "completion": chr(ord("a") + i) * (i + 1), "label": i % 3 > 0} for i in range(12)
        ]
        return write(tmp_path / "rows.jsonl", rows)

    def test_every_row_has_the_completion_of_another_prompt(self, chat_model: str, path: str):
        data = connect(PreferenceData(Preferences(path), batch_size=6), chat_model, KTO(), accumulate=2)
        batches = list(data.train_dataloader())
        assert [batch.mismatched is not None for batch in batches] == [True, False, True, False]
        for first in (0, 2):
            rows, mismatched = pieces(batches[first : first + 2]), pieces(batches[first].mismatched or [])
            assert len(batches[first].mismatched or []) == 2
            assert Counter(prompt for prompt, _ in mismatched) == Counter(prompt for prompt, _ in rows)
            prompt_of = {completion: prompt for prompt, completion in rows}
            assert len(prompt_of) == 6
            assert all(prompt_of[completion] != prompt for prompt, completion in mismatched)

    def test_processes_share_the_same_rows(self, chat_model: str, path: str):
        def step(rank: int, world: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
            data = connect(PreferenceData(Preferences(path), batch_size=6), chat_model, KTO(), rank, world)
            return pieces(next(iter(data.train_dataloader())).mismatched or [])

        whole, halves = step(0, 1), [step(rank, 2) for rank in range(2)]
        assert [len(half) for half in halves] == [3, 3]
        assert sorted(whole) == sorted(halves[0] + halves[1])

    @pytest.mark.parametrize(("prompts", "size"), [(1, 4), (4, 1)])
    def test_a_step_with_a_single_prompt(self, chat_model: str, tmp_path: Path, prompts: int, size: int):
        rows = [{"prompt": f"{i % prompts}=", "completion": str(i), "label": True} for i in range(4)]
        with pytest.raises(UserError, match=r"single prompt.*batch_size"):
            load(rows, tmp_path, chat_model, KTO(), batch_size=size)
        load(rows, tmp_path, chat_model, APOZero(), batch_size=size)


class TestSteps:
    @pytest.fixture
    def demonstrations(self, tmp_path: Path) -> str:
        return write(tmp_path / "rows.jsonl", [{"prompt": f"{i}+0=", "completion": str(i)} for i in range(10)])

    def test_steps_cover_the_data_once_in_a_new_order_each_epoch(self, chat_model: str, demonstrations: str):
        data = connect(PreferenceData(Preferences(demonstrations), batch_size=4), chat_model, accumulate=2)
        batches = list(data.train_dataloader())
        assert len(batches) == len(data.train_dataloader()) == 4  # two steps of two micro-batches; two groups left over
        rows = pieces(batches)
        assert len(set(rows)) == 8
        assert {(b.total_rows, b.total_tokens, b.sampler_logps) for b in batches} == {(4, 8, None)}
        data.trainer.current_epoch = 1
        assert rows != pieces(list(data.train_dataloader()))

    def test_processes_share_a_step(self, chat_model: str, demonstrations: str):
        def step(rank: int, world: int) -> set[Any]:
            data = PreferenceData(Preferences(demonstrations), batch_size=4)
            return set(pieces([next(iter(connect(data, chat_model, None, rank, world).train_dataloader()))]))

        whole, halves = step(0, 1), [step(rank, 2) for rank in range(2)]
        assert whole == halves[0] | halves[1]
        assert not halves[0] & halves[1]

    @pytest.mark.parametrize(
        ("size", "world", "accumulate", "message"),
        [
            (3, 2, 1, "multiple of 2"),
            (4, 2, 3, "at least 6"),
            (20, 1, 1, "only 10 are left"),
            (0, 1, 1, "batch_size: 0"),
        ],
    )
    def test_sizes_that_do_not_fit(
        self, chat_model: str, demonstrations: str, size: int, world: int, accumulate: int, message: str
    ):
        with pytest.raises(UserError, match=message):
            connect(
                PreferenceData(Preferences(demonstrations), batch_size=size), chat_model, None, 0, world, accumulate
            )

    def test_a_step_is_not_cut(self, chat_model: str, demonstrations: str, tmp_path: Path):
        for limit, fits in ((1, False), (2, True), (3, False), (5, True)):
            data = PreferenceData(Preferences(demonstrations), batch_size=4)
            trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, limit_train_batches=limit)
            module = PolicyModule(chat_model, SFT())
            if fits:
                trainer.fit(module, datamodule=data)
            else:
                with pytest.raises(UserError, match=f"limit_train_batches {limit}"):
                    trainer.fit(module, datamodule=data)


def test_pairs_with_one_score_are_no_preference(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [
        {"prompt": f"{i}+0=", "chosen": "1", "rejected": "2", "score_chosen": i, "score_rejected": 3} for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO"):
        data = connect(PreferenceData(Preferences(str(tmp_path / "rows.jsonl")), batch_size=5), model, DPO())
    assert len(data.groups) == 5
    assert "left out 1 pairs whose sides have the same score" in caplog.text


def test_phases_go_on_in_the_data_where_the_last_one_stopped(model: str, tmp_path: Path):
    rows = [{"prompt": f"{i}+0=", "completion": str(i)} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def batches(phases: int, **options: Any) -> list[list[int]]:
        data = connect(PreferenceData(Preferences(str(tmp_path / "rows.jsonl")), batch_size=4, **options), model, SFT())
        found = []
        for data.trainer.current_epoch in range(phases):
            found += [row.tolist() for batch in data.train_dataloader() for row in batch.tokens]
        return found

    whole = batches(3)  # three passes of two steps
    assert batches(6, steps_per_phase=1) == batches(2, steps_per_phase=3) == whole
    assert whole[:8] != whole[8:16]
