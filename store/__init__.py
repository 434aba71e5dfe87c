"""The nouns that are recorded, and the two SQLite files that keep them. Imports nothing of ours."""
