"""The pass over a corpus, and the profile it makes."""
