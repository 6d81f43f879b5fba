"""How good a policy is: win rates with intervals."""
