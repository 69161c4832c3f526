"""The pass over a corpus, and the profile that it gives."""
