"""The claims, chapter by chapter: each claim with its source, its checks and its planted errors."""
