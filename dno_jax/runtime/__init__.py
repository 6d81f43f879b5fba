"""What every stage starts from: compiled programs, the model, the tokenizer, and how much fits."""
