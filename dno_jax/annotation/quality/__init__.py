"""How good a judge is: figures of its own answers, what they warn of, and pairs that people have labelled."""
