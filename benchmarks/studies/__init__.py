"""The questions of the worked study (docs/study.md); ``benchmarks/study.py`` runs them."""
