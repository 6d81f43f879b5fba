"""Texts: tokenizer, chat templates, and how long ones are shortened."""
