"""Prompt templates that have a name for ``data.init_args.template``. Scores of base models depend on them strongly."""

TEMPLATES = {
    "none": "{prompt}",
    # verl's prompt for MATH
    "boxed": "{prompt} Let's think step by step and output the final answer within \\boxed{}.",
    # of Qwen2.5-Math (arXiv 2409.12122), also for tokenizers without a chat template
    "qwen_math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ),
    # of DAPO (arXiv 2503.14476)
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{prompt}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # of DeepSeek-R1-Zero (arXiv 2501.12948, table 1)
    "r1": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The"
        " assistant first thinks about the reasoning process in the mind and then provides the user with the answer."
        " The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags,"
        " respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}."
        " Assistant:"
    ),
}
