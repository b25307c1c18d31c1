"""What prompts take on their way through the model: many tokens of a row at once, of several rows side by side."""
