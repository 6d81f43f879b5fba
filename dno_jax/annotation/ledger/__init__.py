"""What was bought, and what it cost: the store of verdicts, receipts and the budget."""
