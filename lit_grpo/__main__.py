"""The command ``lit-grpo``. Nothing heavy is imported at the top: worker processes import this module again."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HELP = """usage: lit-grpo {fit,validate,test,predict} [-c CONFIG ...] [--KEY VALUE ...]
       lit-grpo export CKPT OUT [--merge] [--model MODEL]
       lit-grpo inspect RUN [--phase N] [--split train|val]
       lit-grpo compare CONFIG_OR_RUN ... [--seeds 0 1 2] [--out FOLDER] [-- --KEY VALUE ...]

RL post-training of language models on Lightning.

commands:
  fit        train the policy
  validate   sample the validation prompts and print Mean@k and Pass@k
  test       sample benchmarks and write tables of Mean@k, Pass@k and their relatives
  predict    sample prompts and write the completions to the run folder
  export     write the policy of a checkpoint as a Hugging Face folder
  inspect    print what stands out in a phase's samples, and write it as a page
  compare    run configs over several seeds and write one report of them

Every key of a config file can be given or changed on the command line, later ones win:
  lit-grpo fit -c configs/paper/2grpo.yaml --model.loss GRPO --data.group_size 16 --data.updates_per_phase 16
  lit-grpo fit -c configs/paper/2grpo.yaml --print_config     show the whole configuration and stop
  lit-grpo fit --help                                        every key with its meaning
"""


def main(args: list[str] | None = None) -> None:
    """Run a command line; a mistake of the user ends it with one message and exit code 2.

    Args:
        args: what follows ``lit-grpo``; that of the process if not given.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):  # building the real parser imports torch, which takes ten seconds
        print(HELP)
        return
    from lit_grpo.errors import UserError, mistakes_end_with_a_message

    with mistakes_end_with_a_message("lit-grpo"):
        if args[0] == "inspect":
            from lit_grpo.reports.inspection import run_inspect

            run_inspect(args[1:])
            return
        found = find_spec("callbacks")
        if found is None or found.origin is None or not Path(found.origin).with_name("rollout.py").exists():
            raise UserError(
                f"The package `callbacks` of lit_grpo is shadowed by {found and found.origin}. Start with the command"
                " `lit-grpo`, which looks into the current folder last."
            )
        if args[0] == "compare":
            from lit_grpo.reports.compare import compare

            if not compare(args[1:]):
                sys.exit(1)
            return
        from lit_grpo.cli import run, run_export

        if args[0] == "export":
            run_export(args[1:])
        else:
            run(args)


if __name__ == "__main__":
    main()
