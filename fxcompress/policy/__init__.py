"""The policy language: texts to checked policies. No torch here."""
