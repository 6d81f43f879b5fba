"""What stages read and write: prompts, rollouts, pools of candidates, pairs."""
