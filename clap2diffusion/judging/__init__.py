"""Proof that the sound matters: the judge, the measures, the tables, the page, the report of a run."""
