"""What a person sees of a run: progress while it runs, tables when it is done."""
