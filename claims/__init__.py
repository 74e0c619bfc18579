"""The claims: one file per chapter, each claim with its source, its checks and its planted errors."""
