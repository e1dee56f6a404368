"""What several runs came to, side by side: ``lit-grpo compare``."""
