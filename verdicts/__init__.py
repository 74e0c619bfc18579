"""Samples in, verdicts out: confidence sequences, equivalence, rates, two-sample tests, the run's error ledger."""
