"""Opens data sets and extracts their text."""
